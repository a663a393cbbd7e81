"""The supervisor of one host: it starts the host's ranks, hears their beats, and ends them all.

    python -m dit_ds.agent      # started on each host by `dit_ds.fleet`, which it talks to on stdin

When the supervisor is gone or silent, it ends its ranks and itself; when it is gone itself, the
kernel ends them, and when it is only stopped, they do (see `beats`). Standard library only: it is
there in a tenth of a second, also where torch is broken.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import os
import pty
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import termios
import threading
import time
import traceback
import tty
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dit_ds import beats, facts, processes, route
from dit_ds.line import Line

_POLL_SECONDS = 0.1
_KILL_SECONDS = 20.0
_TAIL_LINES = 25
_MOST_WAITING = 2**20  # bytes of output on their way to a supervisor that does not take them


@dataclasses.dataclass
class Rank:
    """A process of this host, as last seen."""

    rank: int
    process: subprocess.Popen[bytes]
    log: Path
    code: int | None = None
    beat: beats.Beat | None = None
    quiet: float = 0.0
    stalled: bool = False
    oom_kills: int = 0
    copying: threading.Thread | None = None


def end_agent(pid: int) -> None:
    """End another agent of this host, one that is stopped, and all it started."""
    if b"dit_ds.agent" in Path(f"/proc/{pid}/cmdline").read_bytes():
        for process in [*processes.descendants(pid), pid]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)


ANSWERS: dict[str, Callable[..., Any]] = {
    **facts.ANSWERS,
    "route": route.to,
    "free_port": route.free_port,
    "end_agent": end_agent,
}


def main() -> None:
    """Serve the supervisor until it is done with this host, or gone."""
    # The supervisor decides what ends: a Ctrl-C in its terminal is not for us.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    # Nor is Slurm's SIGTERM, which the ranks get too. Handled, since what is ignored is inherited.
    signal.signal(signal.SIGTERM, lambda number, frame: None)
    processes.adopt_orphans()
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what anything else prints must not stand among the messages
    line = Line(sys.stdin.buffer, out)
    folder = Path(tempfile.mkdtemp(prefix="dit_ds-", dir=_memory()))
    left: list[str] = []
    try:
        _serve(line, folder)
    finally:
        killing = _in_thread(lambda: left.extend(processes.kill_descendants(_KILL_SECONDS)))
        while killing.is_alive():
            line.receive(_POLL_SECONDS)  # which beats
        shutil.rmtree(folder, ignore_errors=True)
    line.send({"bye": left})
    deadline = time.monotonic() + 5
    while line.waiting and time.monotonic() < deadline:
        time.sleep(0.02)
    os._exit(0)  # threads may hang in a storage that does


def _serve(line: Line, folder: Path) -> None:
    ranks: list[Rank] = []
    job: dict[str, Any] = {}
    pulse = beats.Pulse(folder)
    limit, last = 60.0, time.monotonic()
    line.send({"hello": os.getpid()})
    while True:
        for message in line.receive(_POLL_SECONDS):
            if "ask" in message:
                _in_thread(_answer, line, message)
            elif "limit" in message:
                limit = message["limit"]
            elif "start" in message:
                job = message["start"]
                try:
                    ranks = _start(job, line, folder, limit)
                except (OSError, ValueError) as e:
                    line.send({"event": "unable", "why": str(e)})
            elif "signal" in message:
                for rank in ranks:
                    # Before it listens (and beats), a request to save would kill it.
                    deaf = message["signal"] == signal.SIGUSR1 and rank.beat is None
                    if rank.code is None and not deaf:
                        rank.process.send_signal(message["signal"])
            elif "report" in message:
                line.send({"ranks": [_seen(rank) for rank in ranks]})
            elif "end" in message:
                return
        if line.closed or line.silent > limit:
            return
        pulse.beat()
        now = time.monotonic()
        for rank in ranks:
            _watch(rank, job, line, folder, min(now - last, 1.0))
        last = now


def _start(job: dict[str, Any], line: Line, folder: Path, limit: float) -> list[Rank]:
    """The ranks of this host; from the main thread, with whose end they are killed."""
    logs = Path(job["logs"])
    logs.mkdir(parents=True, exist_ok=True)
    common = os.environ | job["environment"]
    # torch would take all cores in every rank, and they would fight over them.
    cores = len(os.sched_getaffinity(0)) // len(job["ranks"])
    common.setdefault("OMP_NUM_THREADS", str(max(1, cores)))
    common |= {beats.FOLDER: str(folder), beats.LIMIT: str(limit)}
    ranks = []
    for local, number in enumerate(job["ranks"]):
        environment = common | {"RANK": str(number), "LOCAL_RANK": str(local)}
        log = logs / f"rank-{number:05d}.log"
        command = [sys.executable, "-u", *job["command"]]
        how: dict[str, Any] = {
            "cwd": job["folder"],
            "env": environment,
            "stdin": subprocess.DEVNULL,
            "start_new_session": True,
            "preexec_fn": processes.die_with_parent,
        }
        copying = None
        with open(log, "ab") as file:
            if number == 0:
                theirs, ours = _output(job.get("terminal"))
                try:
                    process = subprocess.Popen(command, stdout=theirs, stderr=theirs, **how)
                finally:
                    os.close(theirs)
                copying = _in_thread(_copy, ours, log, line)
            else:
                process = subprocess.Popen(command, stdout=file, stderr=file, **how)
        ranks.append(Rank(number, process, log, oom_kills=_oom_kills(), copying=copying))
    return ranks


def _output(terminal: list[int] | None) -> tuple[int, int]:
    """Where rank 0 writes and we read: a terminal of [columns, rows], if the supervisor has one."""
    if terminal is None:
        ours, theirs = os.pipe()
        return theirs, ours
    ours, theirs = pty.openpty()
    tty.setraw(theirs)  # what is written arrives as it is
    columns, rows = terminal
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
    return theirs, ours


def _copy(source: int, log: Path, line: Line) -> None:
    """Rank 0's output to the supervisor, and into its log without what a progress bar overwrote."""
    rest = b""
    with open(log, "ab", buffering=0) as file:
        while True:
            try:
                data = os.read(source, 65536)
            except OSError:  # a terminal that nobody holds any more
                data = b""
            if not data:
                break
            if line.waiting < _MOST_WAITING:
                line.send({"output": data.decode(errors="replace")})
            *whole, rest = (rest + data).split(b"\n")
            rest = rest[rest.rfind(b"\r", 0, -1) + 1 :]
            # A log on a full disk loses lines, and the training goes on.
            with contextlib.suppress(OSError):
                file.write(b"".join(w.rstrip(b"\r").split(b"\r")[-1] + b"\n" for w in whole))
        with contextlib.suppress(OSError):
            file.write(rest)


def _watch(rank: Rank, job: dict[str, Any], line: Line, folder: Path, seconds: float) -> None:
    """Tell the supervisor when a rank has ended, or not beaten within the limit of its phase."""
    if rank.code is not None:
        return
    rank.code = rank.process.poll()
    seen = beats.read(folder, rank.rank)
    rank.quiet = 0.0 if seen and seen != rank.beat else rank.quiet + seconds
    rank.beat = seen or rank.beat
    if rank.code is not None:
        _in_thread(_tell_end, rank, line)
    elif job["limits"] and not rank.stalled:
        rank.stalled = rank.quiet > job["limits"][rank.beat.phase if rank.beat else "start"]
        if rank.stalled:
            line.send({"event": "stalled", **_seen(rank)})


def _tell_end(rank: Rank, line: Line) -> None:
    tail: list[str] = []
    why = ""
    if rank.code == -signal.SIGKILL and _oom_kills() > rank.oom_kills:
        why = "the kernel has killed for want of memory (dmesg tells)"
    if rank.copying:
        rank.copying.join(2.0)  # its last words; what it leaves behind may still hold the pipe
    if rank.code:
        reading = _in_thread(lambda: tail.extend(_tail(rank.log)))
        reading.join(2.0)  # a storage that hangs must not hide this
    told = {"event": "ended", "code": rank.code, "why": why, "tail": "\n".join(tail)}
    line.send(told | _seen(rank))


def _seen(rank: Rank) -> dict[str, Any]:
    beat = rank.beat or beats.Beat(0, "start", 0, "importing")
    return {
        "rank": rank.rank,
        "number": beat.number,
        "phase": beat.phase,
        "step": beat.step,
        "doing": beat.doing,
        "quiet": rank.quiet,
        "state": processes.state(rank.process.pid) if rank.code is None else "",
    }


def _tail(log: Path) -> list[str]:
    """The last lines of a log."""
    with contextlib.suppress(OSError), open(log, "rb") as file:
        file.seek(0, os.SEEK_END)
        file.seek(max(0, file.tell() - 16384))
        return file.read().decode(errors="replace").splitlines()[-_TAIL_LINES:]
    return []


def _oom_kills() -> int:
    """How many processes this kernel has killed for want of memory."""
    with contextlib.suppress(OSError, ValueError):
        for counter in Path("/proc/vmstat").read_text().splitlines():
            if counter.startswith("oom_kill "):
                return int(counter.split()[1])
    return 0


def _answer(line: Line, message: dict[str, Any]) -> None:
    try:
        value = ANSWERS[message["ask"]](**message["arguments"])
        line.send({"answer": message["id"], "value": value})
    except (OSError, ValueError) as e:
        line.send({"answer": message["id"], "error": str(e)})
    except Exception:
        line.send({"answer": message["id"], "error": traceback.format_exc()})


def _in_thread(work: Callable[..., object], *arguments: Any) -> threading.Thread:
    thread = threading.Thread(target=work, args=arguments, daemon=True)
    thread.start()
    return thread


def _memory() -> str | None:
    """Where files are memory, so that no disk can hold up a beat."""
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


if __name__ == "__main__":
    main()
