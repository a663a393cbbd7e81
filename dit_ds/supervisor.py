"""A training, or a tool, on many hosts, that starts, ends and comes back as one.

    python -m dit_ds.supervisor [options] --module dit_ds.train --config RECIPE ...
    python -m dit_ds.supervisor [options] tools/precompute_latents.py --images ...

`launch/train.sh` and `launch/run.sh` call it. Options have the names that DeepSpeed's launcher
gives them. Exit code 0: the run says itself that it is done, or has saved as it was asked to; 2: a
user's mistake; 1: anything else, with the rank that failed first.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from dit_ds import cluster_env, command_line, files, hosts, preflight, run_folder
from dit_ds.beats import PHASES
from dit_ds.console import show
from dit_ds.fleet import Asked, Fleet, Job, Outcome

_TIMEOUTS = dict(zip(PHASES, (900.0, 1800.0, 120.0, 600.0, 900.0), strict=True))
_SAME_FAILURES = 3
_TWICE_SECONDS = 0.5
ENVIRONMENT = Path(__file__).parents[1] / "launch" / "cluster.env"


@dataclasses.dataclass(frozen=True)
class Target:
    """What is to run."""

    command: list[str]
    """After the interpreter."""
    logs: Path
    run: Path | None = None
    """The run directory, if it is a training."""
    data: str = ""
    validation: str = ""


@dataclasses.dataclass(frozen=True)
class Failure:
    """An attempt that failed, and the step of the newest checkpoint by then."""

    outcome: Outcome
    saved: int


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    try:
        options, target = parse(list(sys.argv[1:] if arguments is None else arguments))
        code = supervise(options, target)
    except (ValueError, OSError) as e:
        print(f"error: {files.printable(str(e))}", file=sys.stderr, flush=True)
        code = 2
    sys.exit(code)


def supervise(options: argparse.Namespace, target: Target) -> int:
    """Attempt after attempt, until the target is done, stopped, or beyond hope; the exit code."""
    asked, asked_at = Asked(), float("inf")

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal asked_at
        if number == signal.SIGUSR1:
            asked.save = True
            return
        # A second is meant; but a terminal that is closed sends two at once.
        asked.now = asked.now or time.monotonic() - asked_at > _TWICE_SECONDS
        if not asked.stop:
            asked.stop, asked_at = True, time.monotonic()

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
        if signal.getsignal(number) != signal.SIG_IGN:  # as nohup wants it for SIGHUP
            signal.signal(number, note)
    wanted = choose(options)
    limits = {phase: getattr(options, f"{phase}_timeout") for phase in PHASES}
    environment = cluster_env.environment_of(options.env_file)
    # Held to the end: nobody else starts ranks in the run directory.
    held = run_folder.hold(target.run, options.node_rank) if target.run else None
    port = 0 if wanted.first_rank else options.master_port  # to be free on rank 0's machine
    failures: list[Failure] = []  # since something was saved
    code, again = 0, False
    while True:
        with Fleet(wanted.hosts, slurm=wanted.slurm) as fleet:
            if fit(fleet, target, environment, port=port, again=again):
                logs = run_folder.new_logs(target.logs)
                names = ", ".join(host.name for host in fleet.hosts)
                say(f"{fleet.world_size} ranks on {names}; logs in {logs}")
                job = Job(
                    target.command,
                    logs,
                    limits=limits if target.run else None,
                    environment=environment,
                    master_address=options.master_addr,
                    master_port=options.master_port,
                    first_rank=wanted.first_rank,
                    world_size=wanted.world_size,
                )
                before = run_folder.marker(target.run)
                outcome = fleet.run(job, asked, save_seconds=options.save_timeout)
                if outcome.code == 0 and not run_folder.ended_well(target.run, before):
                    outcome = Outcome(1, "all ranks ended with 0, but the run is not done")
                elif outcome.code and run_folder.marker(target.run) not in ("", before):
                    say(f"the run was done before this: {outcome.why}")
                    outcome = Outcome(0)
                stopped = asked.stop and outcome.cause and outcome.cause.code == -signal.SIGTERM
                if stopped:  # before the ranks could listen; others may have failed for that
                    say("stopped as asked, before there was anything to save")
                    outcome = Outcome(0 if target.run else 1)
                else:
                    tell(outcome, logs)
                for what in fleet.end():
                    say(f"could not be killed, on {what}")
            elif not again:  # nobody has seen these hosts work, so a restart would be a guess
                if held:
                    run_folder.unmake(held)
                return 1
            else:
                outcome = Outcome(1, "there are no hosts to start on")
                say(f"FAILED: {outcome.why}")
        cause = outcome.cause
        if outcome.code == 0:
            break
        failures = in_a_row(failures, Failure(outcome, run_folder.saved_step(target.run)))
        # What a user did wrong shows at the first attempt; later it is a port that was taken, or
        # `train.expect_ranks` while a host is away.
        mistake = outcome.code == 2 and not again
        again = True
        if mistake or asked.stop or len(failures) > options.max_restarts:
            code = outcome.code
            break
        if target.run and (verdict := hopeless(failures)):
            say(verdict)
            return 1
        # What still runs on a host that was lost ends by itself within the limit of a step.
        lost = cause is not None and cause.kind == "lost"
        pause = min(2.0 ** len(failures), 60.0) + limits["step"] * lost
        say(f"restart {len(failures)} of {options.max_restarts} in {pause:.0f} s")
        over = time.monotonic() + pause
        while time.monotonic() < over and not asked.stop:
            time.sleep(0.1)
        if asked.stop:
            say("stopped as asked, before the restart")
            code = 0 if target.run else 1
            break
    if asked.stop and code != 2:  # also where saving failed: it goes on from the last checkpoint
        requeue()
    del held
    return code


def fit(
    fleet: Fleet, target: Target, environment: dict[str, str], *, port: int, again: bool
) -> bool:
    """Whether to start on these hosts; at a restart, those that are not fit are left out."""
    looked = preflight.look(
        fleet,
        run=target.run,
        data=target.data,
        validation=target.validation,
        environment=environment,
        master_port=port,
    )
    for kind, found in (("FAULT", looked.faults), ("note", [] if again else looked.notes)):
        show(preflight.lines(kind, found))
    unfit = dict.fromkeys(fault.host for fault in looked.faults)
    if not unfit:
        return True
    for name in unfit:
        fleet.leave(name)
    if again and fleet.hosts:
        say(f"going on without {', '.join(unfit)}")
        return True
    say("FAILED: not all hosts can be used; mend them, or take them out of the hostfile")
    return False


def tell(outcome: Outcome, logs: Path) -> None:
    """How an attempt failed, with the last words of the rank that did first."""
    if outcome.code == 0:
        return
    say(f"FAILED: {outcome.why}")
    cause = outcome.cause
    if cause and cause.tail and outcome.code != 2:  # what a user did wrong, rank 0 has said
        say(f"the end of {logs}/rank-{cause.rank:05d}.log:")
        show("".join(f"    {line}\n" for line in cause.tail.splitlines()))


def in_a_row(failures: Sequence[Failure], last: Failure) -> list[Failure]:
    """The failures that count towards `--max-restarts`: a run that gets on between them goes on."""
    return [*(f for f in failures if f.saved >= last.saved), last]


def hopeless(failures: Sequence[Failure]) -> str:
    """Why another attempt would fail too, if it would."""
    last = failures[-_SAME_FAILURES:]
    steps, saved = {f.outcome.step for f in last}, {f.saved for f in last}
    if len(last) < _SAME_FAILURES or len(saved) > 1 or len(steps) > 1:
        return ""
    if any(f.outcome.cause is None or f.outcome.cause.kind == "lost" for f in last):
        return ""  # hosts come back
    places = {f.outcome.cause.host for f in last if f.outcome.cause}
    where = f"always first on {places.pop()}" if len(places) == 1 else "on one host or another"
    return (
        f"{len(last)} attempts in a row failed at step {steps.pop()}, {where}, and nothing was "
        f"saved since step {saved.pop()}: not starting again. Hardware seldom fails at one step; "
        "look at the data and the settings of that step, or at that host"
    )


def requeue() -> None:
    """Under Slurm, a job that was stopped (preempted, or out of time) comes back."""
    if job := os.environ.get("SLURM_JOB_ID"):
        done = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True)
        say(done.stderr.strip() if done.returncode else f"Slurm job {job} is queued again")


def say(message: str) -> None:
    """A line of the supervisor among those of rank 0."""
    show(f"[supervisor] {files.printable(message)}\n")


# --------------------------------------------------------------------------- the command line


@dataclasses.dataclass(frozen=True)
class Wanted:
    """Which hosts this supervisor has, and how their ranks stand in the world."""

    hosts: list[hosts.Host]
    slurm: bool = False
    first_rank: int = 0
    world_size: int | None = None
    """None: the ranks of these hosts."""


def choose(options: argparse.Namespace) -> Wanted:
    """The machines and devices to use."""
    slurm = not options.hostfile and "SLURM_JOB_NODELIST" in os.environ
    if options.hostfile:
        found = hosts.read(options.hostfile)
    elif slurm:
        found = hosts.of_slurm(os.environ)
    else:
        found = hosts.of_this_machine(options.num_gpus, options.include)
    found = hosts.choose(found, include=options.include, exclude=options.exclude)
    found = hosts.first(found, nodes=options.num_nodes, slots=options.num_gpus)
    if not options.no_ssh:
        return Wanted(found, slurm)
    number = options.node_rank
    if number is None or not 0 <= number < len(found) or not options.master_addr:
        raise ValueError(
            f"--no_ssh needs --node_rank 0 to {len(found) - 1}, this machine's place in the "
            "hostfile, and --master_addr, the first one's name; give all three on each machine"
        )
    before = sum(len(host.slots) for host in found[:number])
    world = sum(len(host.slots) for host in found)
    return Wanted([hosts.Host("localhost", found[number].slots)], False, before, world)


def parse(words: Sequence[str]) -> tuple[argparse.Namespace, Target]:
    """Our options and what is to run.

    Ours may stand anywhere among those of a training, but before a script.
    """
    parser = argparse.ArgumentParser(
        prog="launch/train.sh",
        description="Run on this machine, or on those of a hostfile, and see that all ends as one.",
        epilog="Further words are those of `python -m dit_ds.train --help`, or of the script.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("-H", "--hostfile", type=Path, help="a line `HOST slots=N` for each machine")
    add("-i", "--include", default="", metavar="HOST:0,2@HOST", help="only these devices")
    add("-e", "--exclude", default="", metavar="HOST:0,2@HOST", help="all but these")
    add("--num_nodes", type=int, metavar="N", help="the first N machines")
    add("--num_gpus", "--num_accelerators", type=int, metavar="N", help="ranks on each machine")
    add("--no_ssh", action="store_true", help="start only this machine's ranks; on each by hand")
    add("--node_rank", type=int, metavar="N", help="its place in the hostfile, from 0")
    add("--master_addr", default="", metavar="HOST", help="where rank 0 is met (default: found)")
    add("--master_port", type=int, default=0, metavar="PORT", help="default: a free one")
    add("--force_multi", action="store_true", help="nothing: one remote machine is used as such")
    add(
        "--max-restarts",
        type=int,
        default=0,
        metavar="N",
        help="start again after N failures in a row",
    )
    for phase, seconds in _TIMEOUTS.items():
        what = f"longest without progress in phase {phase} (default: {seconds:g})"
        add(f"--{phase}-timeout", type=float, default=seconds, metavar="SECONDS", help=what)
    add("--env-file", type=Path, default=ENVIRONMENT, metavar="FILE", help="default: %(default)s")
    if words[:2] == ["--module", "dit_ds.train"]:
        options, rest = parser.parse_known_args(words[2:])
        run, cfg = command_line.training(rest)
        target = Target(
            ["-m", "dit_ds.train", *rest], run / "logs", run, cfg.data.path, cfg.validation.path
        )
    else:
        add("script", type=Path)
        add("arguments", nargs=argparse.REMAINDER)
        options = parser.parse_args(words)
        if not options.script.is_file():
            raise ValueError(f"{options.script} does not exist; name a script, as tools/sample.py")
        logs = Path("runs") / "logs" / options.script.stem
        target = Target([str(options.script), *options.arguments], logs)
    for name in ("max_restarts", *(f"{phase}_timeout" for phase in PHASES)):
        if getattr(options, name) < (name != "max_restarts"):
            option = name.replace("_", "-")
            raise ValueError(f"--{option} {getattr(options, name)} is too small")
    if not 0 <= options.master_port < 65536:
        raise ValueError(f"--master_port {options.master_port}: ports go from 1 to 65535")
    if options.node_rank is not None and not options.no_ssh:
        raise ValueError(
            f"--node_rank {options.node_rank} is this machine's place where each is started by "
            "hand: add --no_ssh, or leave it out to start all machines from here"
        )
    if options.no_ssh and not options.master_port:
        options.master_port = 29500  # the same on all machines, and DeepSpeed's own
    return options, target


if __name__ == "__main__":
    main()
