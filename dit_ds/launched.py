"""How this process was started, and what the outside asks of it while it runs.

DeepSpeed's launcher trains on one machine in silence where the hostfile does not exist, and strips
`--hostfile` from what the ranks see; an ancestor's command line still shows it.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import NamedTuple

from dit_ds import distributed

SAVE, STOP = 1, 2
_ALONE_SECONDS = 600.0
_SSHD = {"sshd", "sshd-session"}


def check(*, expect_ranks: int | None) -> None:
    """Refuse a world that is not the one the user meant.

    Raises:
        ValueError: the launcher was given a hostfile that does not exist, or the number of ranks
            is not `expect_ranks`.
    """
    hostfile = _hostfile()
    if hostfile is not None and not hostfile.is_file():
        raise ValueError(
            f"--hostfile {hostfile} does not exist, so DeepSpeed started on this machine alone; "
            "give an existing file (as launch/hosts), or leave --hostfile out for one machine"
        )
    world = distributed.world_size()
    if expect_ranks is not None and world != expect_ranks:
        raise ValueError(
            f"train.expect_ranks={expect_ranks}, but {world} ranks started; check the hostfile and "
            "--num_gpus, or change train.expect_ranks"
        )


def _hostfile() -> Path | None:
    """The `--hostfile` of the `deepspeed` command among our ancestors, where /proc tells it."""
    for process in _ancestors():
        words = process.words
        program = next((i for i, w in enumerate(words[:3]) if Path(w).name == "deepspeed"), None)
        if program is None:
            continue
        for i, word in enumerate(words[program + 1 :], start=program + 1):
            if not word.startswith("-") and not words[i - 1].startswith("-"):
                break  # the script; what follows are its own arguments
            # argparse takes --hostfile, any beginning of it from --ho on, and -H with or without
            # a space.
            name, equals, value = word.partition("=")
            if word == "-H" or (name.startswith("--ho") and "--hostfile".startswith(name)):
                return process.folder / (value if equals else words[i + 1])
            if word.startswith("-H"):
                return process.folder / word[2:]
    return None


class _Process(NamedTuple):
    pid: int
    began: str
    words: list[str]
    folder: Path

    @property
    def names(self) -> set[str]:
        """What the process may be called; sshd calls those of its sessions `sshd: USER@TTY`."""
        return {Path(word.partition(":")[0]).name for word in self.words[:3]}


def _ancestors() -> Iterator[_Process]:
    """Our parent, its parent, and so on, as far as /proc shows them."""
    pid = os.getppid()
    while pid > 1:
        try:
            words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
            folder = Path(f"/proc/{pid}/cwd").resolve()
            parent, began = _stat(pid)
        except OSError:
            return
        yield _Process(pid, began, words, folder)
        pid = parent


def _stat(pid: int) -> tuple[int, str]:
    """Parent and time of birth; a process that is gone, but not yet reaped, was never born."""
    fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].decode().split()
    return int(fields[1]), "" if fields[0] == "Z" else fields[19]


def _launchers() -> list[_Process]:
    """DeepSpeed's launchers above us, up to the command, or to the ssh session from its host."""
    found: list[_Process] = []
    for process in _ancestors():
        if not found and "deepspeed.launcher.launch" not in process.words:
            return []
        found.append(process)
        if process.names & {"deepspeed", *_SSHD}:
            return found
    return found[:1]


def _is_gone(process: _Process) -> bool:
    try:
        return _stat(process.pid)[1] != process.began
    except OSError:
        return True


class Requests:
    """SIGUSR1 (save), SIGTERM or Ctrl-C (save and end) and `stop_after_hours`, agreed on by all.

    So is the end of a launcher: DeepSpeed's, killed or asked to end, leaves its ranks training.

    A handler only takes a note, since a launcher signals its ranks one after another; the ranks
    compare notes at a step boundary and then act together. Made first of all, so that no signal
    meets the default action and the hours count from the start of the process.
    """

    def __init__(self) -> None:
        self._noted = 0
        self._began = time.monotonic()
        signal.signal(signal.SIGUSR1, self._note)
        signal.signal(signal.SIGTERM, self._note)
        signal.signal(signal.SIGINT, self._note)
        self._alone = False
        if launchers := _launchers():
            threading.Thread(target=self._watch, args=(launchers,), daemon=True).start()

    def _watch(self, launchers: list[_Process]) -> None:
        # pdsh and ssh on the launching machine are not in sight. Where they are killed, sshd here
        # waits for its command all the same; but what rank 0 says has no reader any more.
        over_ssh = launchers[-1].names & _SSHD
        while not any(map(_is_gone, launchers)) and not (over_ssh and distributed.unheard()):
            time.sleep(1.0)
        self._alone = True
        time.sleep(_ALONE_SECONDS)  # for all to save; others may be gone for good
        print("error: DeepSpeed's launcher is gone, and the ranks did not end", file=sys.stderr)
        os._exit(1)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._noted = max(self._noted, SAVE if number == signal.SIGUSR1 else STOP)
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)  # a second Ctrl-C is meant

    def agreed(self, *, stop_after_hours: float | None) -> int:
        """0, SAVE or STOP: the most that any rank was asked for; a collective."""
        # Taken before the ranks compare: what comes in while they do is for the next time.
        noted, self._noted = self._noted, 0
        if stop_after_hours is not None:
            late = time.monotonic() - self._began > stop_after_hours * 3600
            noted = STOP if late else noted
        noted = STOP if self._alone else noted
        return int(distributed.reduce_max(noted))
