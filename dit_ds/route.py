"""How a host reaches the others: the interface and address to use. Standard library only.

A host's own name often resolves to 127.0.1.1 (Debian and Ubuntu install it so), and gloo and NCCL
then offer the others an address that leads nowhere. The kernel knows better.
"""

from __future__ import annotations

import fcntl
import ipaddress
import socket
import struct
from typing import TypedDict

_SIOCGIFADDR = 0x8915  # linux/sockios.h


class Route(TypedDict):
    """The way from here to a peer."""

    interface: str
    address: str


def to(peer: str) -> Route:
    """The interface and own address that packets to `peer` leave by; nothing is sent.

    Raises:
        ValueError: the name does not resolve, or no interface leads there.
    """
    try:
        family, _, _, _, target = socket.getaddrinfo(peer, 9, type=socket.SOCK_DGRAM)[0]
    except OSError as e:
        raise ValueError(
            f"{socket.gethostname()} cannot resolve {peer} ({e}); enter it into DNS or "
            "/etc/hosts of every host"
        ) from e
    with socket.socket(family, socket.SOCK_DGRAM) as s:
        try:
            s.connect(target)
        except OSError as e:
            raise ValueError(
                f"{socket.gethostname()} has no route to {peer} at {target[0]} ({e.strerror})"
            ) from e
        address = s.getsockname()[0]
    return {"interface": _interface(address), "address": address}


def free_port() -> int:
    """A TCP port that nothing listens on here, now."""
    with socket.socket() as s:
        s.bind(("", 0))
        return int(s.getsockname()[1])


def _interface(address: str) -> str:
    """The interface that holds an own address."""
    wanted = ipaddress.ip_address(address.partition("%")[0])
    if wanted.is_loopback:
        return "lo"
    if wanted.version == 6:
        with open("/proc/net/if_inet6") as file:
            held = {f[0]: f[5] for f in map(str.split, file)}
        return held.get(f"{int(wanted):032x}", "")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        for _, name in socket.if_nameindex():
            request = struct.pack("256s", name.encode()[:15])
            try:
                held_by = fcntl.ioctl(s.fileno(), _SIOCGIFADDR, request)[20:24]
            except OSError:  # it has no address
                continue
            if held_by == wanted.packed:
                return name
    return ""
