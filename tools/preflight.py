"""Look whether all machines can train together, before they do; every fault with its remedy.

    python tools/preflight.py --hostfile launch/hosts --config RECIPE [section.key=value ...]
    python tools/preflight.py --hostfile launch/hosts --run DIR --data DIR_OR_URL --quick

Run directory and data are those of a recipe, or given. Without --hostfile, this machine or those
of the Slurm job. See `dit_ds.preflight`. Exits with 1 if there are faults, with 2 on mistakes, with
130 on Ctrl-C.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from dit_ds import cluster_env, config, preflight, run_folder, supervisor
from dit_ds.files import printable
from dit_ds.fleet import Fleet


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    add = parser.add_argument
    add("-H", "--hostfile", type=Path, help="a line `HOST slots=N` for each machine")
    add("-i", "--include", default="", metavar="HOST:0,2@HOST", help="only these devices")
    add("-e", "--exclude", default="", metavar="HOST:0,2@HOST", help="all but these")
    add("--num_nodes", type=int, metavar="N", help="the first N machines")
    add("--num_gpus", "--num_accelerators", type=int, metavar="N", help="ranks on each machine")
    add("--master_port", type=int, default=0, metavar="PORT", help="default: any")
    add("--env-file", type=Path, default=supervisor.ENVIRONMENT, help="default: %(default)s")
    add("--config", metavar="RECIPE", help="names run directory and data")
    add("--run", type=Path, metavar="DIR", help="run directory, which need not exist")
    add("--data", default="", metavar="DIR_OR_URL", help="folder of a manifest.json")
    add(
        "--disk-gb",
        type=float,
        default=preflight.DISK_GB,
        help="free disk that the run needs, 10^9 bytes (default: %(default)s)",
    )
    add("--quick", action="store_true", help="start no ranks, so do not measure the network")
    add("--json", action="store_true", help="one JSON object on the last line")
    add("overrides", nargs="*", metavar="section.key=value", help="of the recipe")
    args = parser.parse_intermixed_args(arguments)
    args.no_ssh = False
    try:
        report = look(args)
    except (ValueError, OSError) as error:
        parser.exit(2, f"error: {printable(str(error))}\n")
    except KeyboardInterrupt:
        parser.exit(130, "interrupted\n")
    if args.json:
        print(json.dumps(report.as_json()))
    parser.exit(1 if report.faults else 0)


def look(args: argparse.Namespace) -> preflight.Report:
    """Look, print, and measure if nothing is wrong so far."""
    run, data, validation = args.run, args.data, ""
    if args.config:
        cfg = config.load(args.config, args.overrides)
        run = run or Path("runs") / cfg.name
        data, validation = data or cfg.data.path, cfg.validation.path
    elif args.overrides:
        raise ValueError(f"{args.overrides[0]} is a setting of a recipe; name it with --config")
    wanted = supervisor.choose(args)
    environment = cluster_env.environment_of(args.env_file)
    with Fleet(wanted.hosts, slurm=wanted.slurm) as fleet:
        report = preflight.look(
            fleet,
            run=run,
            data=data,
            validation=validation,
            environment=environment,
            master_port=args.master_port,
            disk_gb=args.disk_gb,
        )
        print(report.table(), flush=True)
        left_out = ["the run directory (--run or --config)"] * (not run)
        left_out += ["data (--data or --config)"] * (not data)
        left_out += [f"what is at the URL {data}"] * ("://" in data)
        if args.quick or report.faults:
            left_out.append("the network" + (", before the faults are mended" * (not args.quick)))
        else:
            print("the ranks measure the network ...", flush=True)
            logs = run_folder.new_logs(Path("runs") / "logs" / "preflight")
            told = len(report.faults)
            preflight.measure(fleet, report, logs, environment=environment)
            print(preflight.lines("FAULT", report.faults[told:]), end="", flush=True)
    for what in left_out:
        print(f"not looked at: {what}")
    ranks = sum(len(host.slots) for host in wanted.hosts)
    print(f"{len(wanted.hosts)} hosts, {ranks} ranks: {len(report.faults)} faults", flush=True)
    return report


if __name__ == "__main__":
    main()
