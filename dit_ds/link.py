"""The way to the agent of one host: a child on this machine, or over ssh or Slurm's `srun`."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import threading
from pathlib import Path

from dit_ds import processes
from dit_ds.hosts import Host
from dit_ds.line import Line

_REPOSITORY = Path(__file__).parents[1]
# ssh itself never gives a silent host up: the beats of `line` decide, within the limit of a step.
_SSH: tuple[str, ...] = ("-T", "-oBatchMode=yes", "-oConnectTimeout=10", "-oServerAliveInterval=15")
_SSH += ("-oServerAliveCountMax=10000", "-oTCPKeepAlive=no")
# What a host's environment needs of ours; the rest (PATH, HOME, ...) is its own.
_PASSED: tuple[str, ...] = (
    "NCCL_",
    "GLOO_",
    "DS_",
    "OMP_",
    "MKL_",
    "TORCH",
    "PYTORCH_",
    "PYTHON",
    "CUDA_",
    "HF_",
)
_PASSED += ("UCX_", "FI_", "TQDM_", "DIT_DS_", "AWS_", "FSSPEC_", "http", "no_proxy", "VIRTUAL_ENV")


class Link:
    """The way to the agent of one host."""

    def __init__(self, host: Host, *, slurm: bool) -> None:
        self.host, self.slurm, self.agent = host, slurm, 0
        python = f"cd {shlex.quote(str(_REPOSITORY))} && exec {shlex.quote(sys.executable)}"
        agent = f"{python} -m dit_ds.agent"
        if slurm:
            one = ("--nodes=1", "--ntasks=1", "--overlap", "--cpu-bind=none", "--unbuffered")
            command = ["srun", *one, f"--nodelist={host.name}", "bash", "-c", agent]
        elif host.here:
            command = ["bash", "-c", agent]
        else:
            command = ["ssh", *_SSH, host.name, agent]
        # A session of its own: the terminal's Ctrl-C is for the supervisor alone.
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
            preexec_fn=processes.die_with_parent,
        )
        assert self.process.stdin and self.process.stdout
        self.line = Line(self.process.stdout, self.process.stdin)
        self._said: list[str] = []
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        assert self.process.stderr
        for line in self.process.stderr:
            self._said = [*self._said[-9:], line.decode(errors="replace").strip()]

    def why(self) -> str:
        """Why it is gone, with the remedy where it is known."""
        try:
            # Only where it is at its end: waiting for each of many hosts, none would hear from us.
            code = self.process.wait(2 if self.line.closed else 0)
        except subprocess.TimeoutExpired:
            return f"not heard for {self.line.silent:.0f} s; the host is down, stopped or cut off"
        said = next((line for line in reversed(self._said) if line), "")
        for words, remedy in _REMEDIES.items():
            if words in said:
                return f"{said}; {remedy}"
        how = "was killed" if code < 0 else f"ended with {code}"
        return f"the way to its agent {how}{f' ({said})' if said else ''}"

    def end(self) -> None:
        """Cut it; the agent ends all it started, and itself."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGKILL)
        self.process.wait()


_REMEDIES = {
    "Permission denied": "ssh must work without a password: ssh-copy-id, or an agent with the key",
    "Host key verification failed": "accept its key once by hand: ssh HOST true",
    "Could not resolve": "enter it into DNS or /etc/hosts, or correct the hostfile",
    "Connection refused": "start sshd there",
    "timed out": "is it up, and does its firewall let ssh through?",
    "No route to host": "is it up, and on this network?",
    "No such file or directory": "the repository and its environment must lie at the same paths",
    "No module named": "the repository and its environment must lie at the same paths",
}


def passed() -> dict[str, str]:
    """The part of this environment that goes to all hosts."""
    return {name: value for name, value in os.environ.items() if name.startswith(_PASSED)}
