"""What the ranks measure of the network between them: right sums, bandwidths, what is slow.

    python -m dit_ds.network --out FILE.json    # in every rank, under any launcher

Exit code 1, and the ranks named, where an all-reduce gives wrong sums. The bus bandwidths are those
of NCCL's tests (https://github.com/NVIDIA/nccl-tests/blob/master/doc/PERFORMANCE.md): bytes through
each rank's own link, to be compared with its speed whatever the number of ranks.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import socket
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tqdm import tqdm

from dit_ds import beats, distributed, files

_MOST_HOSTS_FOR_ALL_PAIRS = 16
REPEATS = 5
# A measurement grows until it takes so long: five of them and those before are 0.2 s where the
# network is fast.
_LONG_SECONDS = 0.02
_FIRST_BYTES, _MOST_BYTES = 1 << 18, 1 << 28


@dataclasses.dataclass(frozen=True)
class Host:
    """A machine by its own name, and the first of its ranks, which measures for it."""

    name: str
    rank: int


@dataclasses.dataclass(frozen=True)
class Link:
    """Between two hosts.

    bytes_per_second: the slower way. latency_seconds: of a message of 8 bytes, one way; gloo asks
    before it sends, so that with it this is a round trip of the network.
    """

    hosts: tuple[str, str]
    bytes_per_second: float
    latency_seconds: float


def hosts() -> list[Host]:
    """The machines of this world; two of the same name get their rank's number. A collective."""
    told = distributed.gather_json([socket.gethostname(), distributed.local_rank()])
    found = [Host(name, rank) for rank, (name, local) in enumerate(told) if local == 0]
    names = [host.name for host in found]
    return [
        Host(f"{h.name} (rank {h.rank})", h.rank) if names.count(h.name) > 1 else h for h in found
    ]


def check_all_reduce(num_elements: int = 1 << 20) -> list[str]:
    """The ranks (`rank 1 on HOST`) whose all-reduce of known numbers gives wrong sums.

    Whole numbers, others on each rank, whose sums float64 holds exactly. A collective.
    """
    pattern = torch.arange(num_elements, dtype=torch.float64, device=distributed.device()) % 1009
    world = distributed.world_size()
    sums = pattern * (distributed.rank() + 1)
    dist.all_reduce(sums)
    wrong = int((sums != pattern * (world * (world + 1) // 2)).sum())
    told = distributed.gather_json([wrong, socket.gethostname()])
    return [f"rank {rank} on {host}" for rank, (wrong, host) in enumerate(told) if wrong]


def rounds(num_hosts: int) -> list[list[tuple[int, int]]]:
    """Which hosts measure together: rounds of disjoint pairs.

    Up to 16 hosts all pairs. Of more, each with those 1, 2, 4, ... further along a ring, two or
    three rounds for each distance.
    """
    if num_hosts <= _MOST_HOSTS_FOR_ALL_PAIRS:
        distances = list(range(1, num_hosts // 2 + 1))
    else:
        distances = [2**i for i in range(num_hosts.bit_length() - 1)]
    ring = [(i, (i + distance) % num_hosts) for distance in distances for i in range(num_hosts)]
    pairs = dict.fromkeys((min(pair), max(pair)) for pair in ring)
    found: list[list[tuple[int, int]]] = []
    for pair in pairs:
        for together in found:
            if not {i for other in together for i in other} & set(pair):
                together.append(pair)
                break
        else:
            found.append([pair])
    return found


def bandwidth(of: Sequence[Host], *, repeats: int = REPEATS) -> list[Link]:
    """Bandwidth and latency between the hosts of each pair in `rounds`; a collective.

    Disjoint pairs are measured at the same time, as in training: what they share on the way (a
    switch, an uplink) is shared here too.
    """
    mine: list[Any] = []
    for together in tqdm(rounds(len(of)), "pairs of hosts", disable=_quiet(), leave=False):
        distributed.barrier()
        beats.beat("start", doing="measuring the links between hosts")
        for a, b in together:
            if distributed.rank() in (of[a].rank, of[b].rank):
                peer = of[b].rank if distributed.rank() == of[a].rank else of[a].rank
                link = _measure_link(peer, repeats)
                if distributed.rank() == of[a].rank:
                    mine.append([a, b, *link])
    told = sorted(itertools.chain.from_iterable(distributed.gather_json(mine)))
    return [Link((of[a].name, of[b].name), *link) for a, b, *link in told]


def _measure_link(peer: int, repeats: int) -> tuple[float, float]:
    """Bytes a second to or from another rank, the slower way, and the seconds of a message.

    One way at a time: TCP loses much of a narrow link where data and answers cross.
    """
    first = distributed.rank() < peer

    def carry(way: Callable[..., Any], values: torch.Tensor) -> None:
        for work in dist.batch_isend_irecv([dist.P2POp(way, values, peer)]):
            work.wait()

    def agree(seconds: float) -> float:
        told = torch.tensor([seconds], dtype=torch.float64, device=distributed.device())
        carry(dist.isend if first else dist.irecv, told)
        return float(told.item())

    def seconds_of(there: int, back: int) -> float:
        out, answer = (
            torch.zeros(n, dtype=torch.uint8, device=distributed.device()) for n in (there, back)
        )

        def turn() -> None:
            carry(dist.isend if first else dist.irecv, out)
            carry(dist.irecv if first else dist.isend, answer)

        return _median_seconds(turn, agree, repeats)

    ways = [_grow(lambda n: seconds_of(n, 8)), _grow(lambda n: seconds_of(8, n))]
    rates = [num_bytes / (seconds - round_trip) for num_bytes, seconds, round_trip in ways]
    return min(rates), min(round_trip for _, _, round_trip in ways) / 2


def _grow(seconds_of: Callable[[int], float]) -> tuple[int, float, float]:
    """Enough bytes to hide the latency, the seconds that they take, and those of 8 bytes."""
    latency, num_bytes = seconds_of(8), _FIRST_BYTES
    long = max(_LONG_SECONDS, 5 * latency)
    while (seconds := seconds_of(num_bytes)) < long and num_bytes < _MOST_BYTES:
        num_bytes *= 4
    return num_bytes, seconds, latency


def _median_seconds(
    what: Callable[[], object], agree: Callable[[float], float], repeats: int
) -> float:
    """Of some turns after a first one, each as long as all who take part agree that it took."""
    found = []
    for _ in range(repeats + 1):
        distributed.synchronize()
        began = time.perf_counter()
        what()
        distributed.synchronize()
        found.append(agree(time.perf_counter() - began))
    return statistics.median(found[1:])


def slow(links: Sequence[Link]) -> tuple[list[str], list[tuple[str, str]]]:
    """Hosts, and links between the other hosts, with less than half of what is usual.

    A host is slow when its best link is below half of the median host's; a link, when it is below
    half of the median of those that touch no slow host. With less than three links nothing is
    usual, and nothing slow.
    """
    if len(links) < 3:
        return [], []
    best: dict[str, float] = {}
    for link in links:
        for name in link.hosts:
            best[name] = max(best.get(name, 0.0), link.bytes_per_second)
    usual = statistics.median(best.values())
    slow_hosts = [name for name, found in best.items() if found < usual / 2]
    others = [link for link in links if not set(link.hosts) & set(slow_hosts)]
    usual = statistics.median(link.bytes_per_second for link in others) if others else 0.0
    return slow_hosts, [link.hosts for link in others if link.bytes_per_second < usual / 2]


def collectives(*, repeats: int = REPEATS) -> dict[str, float]:
    """Bus bandwidth in bytes per second of what ZeRO uses, over all ranks; a collective.

    Bytes of the whole tensor in the seconds of the slowest rank, times (n - 1) / n of n ranks, and
    twice that for an all-reduce.
    """
    world, device = distributed.world_size(), distributed.device()

    def rate(run: Callable[[torch.Tensor, torch.Tensor], Any]) -> float:
        def seconds_of(num_bytes: int) -> float:
            share = torch.zeros(-(-num_bytes // (4 * world)), device=device)
            whole = torch.zeros(share.numel() * world, device=device)
            return _median_seconds(lambda: run(whole, share), distributed.reduce_max, repeats)

        num_bytes, seconds, _ = _grow(seconds_of)
        return num_bytes / seconds * (world - 1) / world

    if world == 1:
        return {}
    return {
        "all_reduce": 2 * rate(lambda whole, share: dist.all_reduce(whole)),
        "all_gather": rate(lambda whole, share: dist.all_gather_into_tensor(whole, share)),
        "reduce_scatter": rate(lambda whole, share: dist.reduce_scatter_tensor(share, whole)),
    }


def measure(*, repeats: int = REPEATS) -> dict[str, Any]:
    """All of it, as JSON, times as medians of `repeats` turns; a collective.

    Where sums are wrong, nothing else is measured.
    """
    found: dict[str, Any] = {
        "ranks": distributed.world_size(),
        "hosts": [host.name for host in hosts()],
        "backend": dist.get_backend(),
        "wrong_sums": check_all_reduce(),
    }
    if found["wrong_sums"]:
        return found
    links = bandwidth(hosts(), repeats=repeats)
    slow_hosts, slow_links = slow(links)
    beats.beat("start", doing="measuring collectives of all ranks")
    return found | {
        "links": [dataclasses.asdict(link) for link in links],
        "links_at_once": max(map(len, rounds(len(found["hosts"]))), default=0),
        "slow_hosts": slow_hosts,
        "slow_links": slow_links,
        "bus_bytes_per_second": collectives(repeats=repeats),
    }


def tell(found: dict[str, Any]) -> list[str]:
    """What `measure` found, in lines for people."""
    lines = [f"{found['ranks']} ranks on {len(found['hosts'])} hosts, {found['backend']}"]
    if found["wrong_sums"]:
        return [*lines, f"wrong sums in an all-reduce on {', '.join(found['wrong_sums'])}"]
    at_once = found["links_at_once"]
    for link in found["links"]:
        pair = tuple(link["hosts"])
        mark = ""
        if set(pair) & set(found["slow_hosts"]):
            mark = "  slow host"
        elif pair in map(tuple, found["slow_links"]):
            mark = "  slow link"
        lines.append(
            f"{' - '.join(pair):32} {gigabits(link['bytes_per_second'])}, "
            f"{1000 * link['latency_seconds']:.3f} ms{mark}"
        )
    if at_once > 1:
        lines.append(f"(up to {at_once} pairs at once, which share what is common on their ways)")
    for name, rate in found["bus_bytes_per_second"].items():
        lines.append(f"{name + ' over all ranks':32} {gigabits(rate)} bus bandwidth")
    return lines


def gigabits(bytes_per_second: float) -> str:
    """A bandwidth as links are sold."""
    return f"{8e-9 * bytes_per_second:.3g} Gbit/s"


def _quiet() -> bool | None:
    return None if distributed.is_main() else True


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure in this world and write what was found, as JSON, from rank 0."""
    parser = argparse.ArgumentParser(prog="dit_ds.network", description="Measure the network.")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.json")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the launcher adds it
    args = parser.parse_args(arguments)
    beats.begin()
    try:
        distributed.init()
        beats.beat("start", doing="adding up in an all-reduce")
        found = measure()
        with distributed.agreed():
            if distributed.is_main():
                files.write_atomically(args.out, json.dumps(found, indent=2) + "\n")
        for line in tell(found):
            distributed.print_main(line)
    except ValueError as e:
        distributed.exit_with(e)
    distributed.shutdown()
    if found["wrong_sums"]:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
