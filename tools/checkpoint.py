"""Look after the checkpoints of a run: show them, verify every byte, make room.

    python tools/checkpoint.py show RUN_DIR
    python tools/checkpoint.py verify RUN_DIR
    python tools/checkpoint.py prune RUN_DIR --keep 1 --dry-run

See `dit_ds.inventory` and `dit_ds.archive`. All work while the run trains. Exits with 1 if there
are faults (`prune`: if nothing is whole, or something could not be removed), with 2 on mistakes,
with 130 on Ctrl-C.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
from pathlib import Path
from typing import IO, Any

from dit_ds import files, inventory, retention
from dit_ds.archive import Checkpoint, CheckpointError
from dit_ds.files import printable

Facts = dict[str, Any]
_MOST_METRICS = 8


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    commands = parser.add_subparsers(dest="command", required=True)
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("run", type=Path, metavar="RUN_DIR", help="or its `checkpoints` folder")
    common.add_argument("--json", action="store_true", help="one JSON object on the last line")

    commands.add_parser("show", parents=[common], help="what there is, by indexes and headers")
    verify = commands.add_parser(
        "verify", parents=[common], help="read all bytes, name every fault"
    )
    verify.add_argument("--step", type=int, metavar="N", help="that checkpoint alone")
    prune = commands.add_parser(
        "prune", parents=[common], help="remove what the rule of the run, or yours, does not keep"
    )
    prune.add_argument("--keep", type=int, metavar="N", help="the newest N stay, 1 or more")
    prune.add_argument("--keep-every", type=int, metavar="N", help="multiples of N too; 0 for none")
    prune.add_argument("--keep-best", metavar="METRIC", help="the least of it too; '' for none")
    prune.add_argument("--dry-run", action="store_true", help="tell, and remove nothing")

    args = parser.parse_args(arguments)
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends us in silence, as it does others
    command = {"show": _show, "verify": _verify, "prune": _prune}[args.command]
    try:
        facts = command(_folder(args.run), args)
    except (ValueError, OSError) as error:
        parser.exit(2, f"error: {printable(str(error))}\n")
    except KeyboardInterrupt:
        parser.exit(130, "interrupted\n")
    if args.json:
        print(json.dumps(facts))
    if facts["faults"]:
        parser.exit(1)


def _folder(run: Path) -> Path:
    """The folder of the checkpoints of a run, which must have some."""
    root = Path(os.path.abspath(run))  # links stay: a run's lock lies beside its own `checkpoints`
    if not root.is_dir():
        raise ValueError(f"RUN_DIR={run}: {'not a' if root.exists() else 'no such'} folder")
    if root.name != "checkpoints" or (root / "checkpoints").is_dir():
        root /= "checkpoints"
    if not retention.committed(root) and not retention.leftovers(root):
        raise ValueError(f"RUN_DIR={run}: there are no checkpoints in {root}")
    return root


def _show(root: Path, args: argparse.Namespace) -> Facts:
    found = inventory.look(root)
    good = inventory.usable(found)
    resumed = good[0].path if good else None
    rule = inventory.rule_of(good[0]) if good else {}
    keep = retention.Keep(**rule) if rule else None
    kept = keep.of({c.step: c.index.metrics for c in good}) if keep else set()
    rows = []
    for f in found:
        row = _about(f.checkpoint) if f.checkpoint else {}
        row |= {"name": f.path.name, "num_bytes": inventory.num_bytes(f.path)}
        row |= {"fault": str(f.fault) if f.fault else None, "latest": f.latest, "newer": f.newer}
        row["resumed"] = f.path == resumed
        row["kept"] = f.path == resumed or (not f.newer and row.get("step") in kept and not f.fault)
        rows.append(row)
        _say(_line(row))
    known = {f.path for f in found} | {root / "latest"}
    others = [path for path in sorted(root.iterdir()) if path not in known]
    uncommitted = retention.leftovers(root)
    rest: list[Facts] = [
        {"name": path.name, "num_bytes": inventory.num_bytes(path)} for path in others
    ]
    for path, entry in zip(others, rest, strict=True):
        kind = "a save under way, or left by a killed one" if path in uncommitted else "not ours"
        _say(f"{entry['name']}  {_size(entry['num_bytes'])}  {kind}")
    total, free = sum(r["num_bytes"] for r in rows + rest), shutil.disk_usage(root).free
    _say(f"the run keeps {keep}" if keep else "what the run keeps is not known")
    _say(f"{root}: {len(rows)} checkpoints, {_size(total)} in all, {_size(free)} free on the disk")
    return {
        "checkpoints": rows,
        "others": rest,
        "rule": rule or None,
        "num_bytes": total,
        "free_bytes": free,
        "faults": [row["fault"] for row in rows if row["fault"]],
    }


def _about(checkpoint: Checkpoint) -> Facts:
    """What an index says. `about` may be anyone's and anything."""
    index = checkpoint.index
    weights, precision = index.about.get("weights"), index.about.get("precision")
    images = weights.get("images_seen") if isinstance(weights, dict) else None
    return {
        "step": index.step,
        "images_seen": images if type(images) is int and 0 <= images < 2**53 else None,
        "saved_at": index.saved_at,
        "world_size": index.world_size,
        "zero_stage": index.zero_stage,
        "precision": precision[:20] if isinstance(precision, str) else None,
        "metrics": index.metrics,
    }


def _line(row: Facts) -> str:
    """A checkpoint in one line."""
    cells = [f"{row['name']}  {_size(row['num_bytes']):>9}"]
    if "step" in row:
        images = "?" if row["images_seen"] is None else row["images_seen"]
        ranks = f"{row['world_size']} rank{'s' if row['world_size'] > 1 else ''}"
        cells += [f"{images} images", row["saved_at"]]
        cells += [f"{ranks}, ZeRO {row['zero_stage']}, {row['precision'] or '?'}"]
    cells.append(f"FAULT: {row['fault']}" if row["fault"] else "ok")
    cells += ["latest"] if row["latest"] else []
    cells += ["a resume goes on from here"] if row["resumed"] else []
    cells += ["stays"] if row["kept"] else []
    cells += ["newer than latest: ignored, removed at the next save"] if row["newer"] else []
    metrics = sorted(row.get("metrics", {}).items())
    cells += [f"{name}={value:.4g}" for name, value in metrics[:_MOST_METRICS]]
    cells += ["..."] if len(metrics) > _MOST_METRICS else []
    return "  ".join(cells)


def _verify(root: Path, args: argparse.Namespace) -> Facts:
    paths = retention.committed(root)
    if args.step is not None:
        steps = ", ".join(str(retention.step_of(path)) for path in paths)
        paths = [path for path in paths if retention.step_of(path) == args.step]
        if not paths:
            raise ValueError(f"--step {args.step}: there are checkpoints of the steps {steps}")
    faults: list[str] = []
    for path in paths:
        try:
            found = [str(fault) for fault in Checkpoint.open(path).faults()]
        except CheckpointError as error:
            found = [str(error)]
        if not path.is_dir():
            _say(f"{path.name}  removed meanwhile")
            continue
        _say(f"{path.name}  {'NOT WHOLE' if found else 'ok, every byte'}")
        for fault in found:
            _say(f"FAULT: {fault}")
        faults += found
    return {"checkpoints": [path.name for path in paths], "faults": faults}


def _prune(root: Path, args: argparse.Namespace) -> Facts:
    asked = {"last": args.keep, "every": args.keep_every, "best": args.keep_best}
    asked = {name: value for name, value in asked.items() if value is not None}
    if asked.get("last", 1) < 1:
        raise ValueError(f"--keep {args.keep}: at least 1 stays")
    if asked.get("every", 0) < 0:
        raise ValueError(f"--keep-every {args.keep_every}: give a number of steps, or 0 for none")
    # Not held while all bytes are read: a training that wants to start need not wait for that.
    held = _hold(root.parent)
    if held is not None:
        held.close()
    plan = inventory.plan(root, asked, alone=held is not None)
    again = _hold(root.parent)
    try:
        if held is not None and again is None:
            raise ValueError(f"RUN_DIR={args.run}: a training began meanwhile; run this again")
        return _carry_out(root, plan, args.dry_run)
    finally:
        if again is not None:
            again.close()


def _hold(run: Path) -> IO[bytes] | None:
    """The run, if it is certain that nobody trains in it."""
    # Every training leaves a lock. Without one this is not where it looked for it, and no proof.
    if not (run / ".lock").is_file():
        return None
    try:
        return files.lock(run / ".lock")
    except (ValueError, OSError):
        return None


def _carry_out(root: Path, plan: inventory.Plan, dry_run: bool) -> Facts:
    sizes = {path: inventory.num_bytes(path) for path in plan.remove}
    # All of them, whoever reads what is said.
    left, failed = ({}, {}) if dry_run else inventory.carry_out(root, plan)
    gone = {path: why for path, why in plan.remove.items() if path not in left | failed}
    left = plan.leave | left
    for path in plan.stay:
        _say(f"stays    {path.name}  {_size(inventory.num_bytes(path))}  ok, every byte")
    for path, why in left.items():
        _say(f"left     {path.name}  {_size(inventory.num_bytes(path))}  {why}")
    for path, why in gone.items():
        _say(f"{'would go' if dry_run else 'removed '} {path.name}  {_size(sizes[path])}  {why}")
    for fault in failed.values():
        _say(f"FAULT: {fault}")
    freed, faults = sum(sizes[path] for path in gone), list(failed.values())
    free = shutil.disk_usage(root).free
    if plan.stay or plan.remove:
        done = "would remove {}, and free {}" if dry_run else "removed {}, and freed {}"
        told = done.format(len(gone), _size(freed))
        rule = f"the rule keeps {plan.keep}; " if plan.keep else ""
        _say(f"{rule}{told}; {_size(free)} free on the disk now")
    else:
        faults = [f"no checkpoint in {root} that a resume would take is whole: nothing was removed"]
        _say(f"FAULT: {faults[0]}")
    return {
        "stay": [path.name for path in plan.stay],
        "left": {path.name: why for path, why in left.items()},
        "removed": [path.name for path in gone],
        "freed_bytes": freed,
        "free_bytes": free,
        "dry_run": dry_run,
        "faults": faults,
    }


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.2f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.2f} MB"


def _say(line: str) -> None:
    print(printable(line), flush=True)


if __name__ == "__main__":
    main()
