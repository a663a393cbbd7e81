"""What a slow link costs, by ZeRO stage and gradient accumulation: measured on two hosts, drawn.

    python -m tests.multinode.plot_links --out launch/links.png    # as root, some 15 minutes

Two hosts out of namespaces train a small DiT with the files of ds_configs/ as they are: first over
what connects them, then over 100 Mbit/s with a delay of 20 ms each way. The figures are printed as
a table for tools/BENCHMARKS.md.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from tests.multinode.lab import Lab, why_not

MBIT, MS = 100, 20
FILES = ("zero0", "zero1", "zero2", "zero2_cluster", "zero3", "zero3_cluster")
ACCUMULATION = (1, 2, 4, 8)
# 2.8 M parameters, whose gradients take a second on such a link; samples for some tenths.
SIZES = {"patch_size": 4, "hidden_size": 192, "depth": 4, "num_heads": 3}
NUM_SAMPLES = 16
STEPS = 4
Seconds = dict[str, list[float]]  # of a step, by file, for each of ACCUMULATION


def measure(out: Path) -> None:
    """In a rank: seconds of a step for every file and accumulation, into `out` by rank 0."""
    from dit_ds import distributed, zero_config
    from dit_ds.benchmark import make_engine, step_on_noise

    distributed.init()
    found: Seconds = {}
    for name in FILES:
        ds_config = zero_config.load(Path("ds_configs") / f"{name}.json")
        found[name] = []
        for micro_steps in ACCUMULATION:
            with contextlib.redirect_stdout(None):  # DeepSpeed counts memory there
                engine, _ = make_engine(SIZES, ds_config, micro_steps=micro_steps)
            seconds = []
            for _ in range(1 + STEPS):
                distributed.barrier()
                began = time.perf_counter()
                step_on_noise(engine, NUM_SAMPLES)
                seconds.append(distributed.reduce_max(time.perf_counter() - began))
            engine.destroy()
            # The fastest: what else the machine does only ever adds.
            found[name].append(min(seconds[1:]))
            distributed.print_main(name, micro_steps, [round(s, 2) for s in seconds])
    if distributed.is_main():
        out.write_text(json.dumps(found))
    distributed.shutdown()


def run(lab: Lab, out: Path) -> Seconds:
    """`measure` on two hosts."""
    commands = lab.ranks(lab.names, "-m", "tests.multinode.plot_links", "--measure", str(out))
    ranks = [subprocess.Popen(command, stderr=subprocess.DEVNULL) for command in commands]
    if any([rank.wait() for rank in ranks]):
        raise SystemExit("a rank failed")
    found: Seconds = json.loads(out.read_text())
    return found


def table(fast: Seconds, slow: Seconds) -> str:
    """Seconds of a step on the slow link, and their ratio to those on the fast one."""
    lines = ["| file | " + " | ".join(f"k = {k}" for k in ACCUMULATION) + " |", "| --- " * 5 + "|"]
    for name in FILES:
        cells = [f"{s:.1f} s, x {s / f:.1f}" for s, f in zip(slow[name], fast[name], strict=True)]
        lines.append(f"| `{name}.json` | {' | '.join(cells)} |")
    return "\n".join(lines)


COLOURS = {  # of Okabe and Ito, told apart by all eyes
    "zero0": "#000000",
    "zero1": "#0072b2",
    "zero2": "#e69f00",
    "zero2_cluster": "#d55e00",
    "zero3": "#56b4e9",
    "zero3_cluster": "#009e73",
}


def draw(fast: Seconds, slow: Seconds, path: Path) -> None:
    """Seconds for each micro-step over their number, as lines; thin ones are of the fast link."""
    scale = 2  # drawn large and made small: smooth lines
    width, height = 820 * scale, 470 * scale
    left, right, top, bottom = 70 * scale, 600 * scale, 80 * scale, 400 * scale
    image = Image.new("RGB", (width, height), "white")
    pen = ImageDraw.Draw(image)

    def write(
        x: float, y: float, text: str, *, size: int = 13, anchor: str, fill: str = "#222"
    ) -> None:
        font = ImageFont.load_default(size * scale)
        pen.text((x, y), text, font=font, anchor=anchor, fill=fill)

    def each(seconds: list[float]) -> list[float]:
        return [s / k for s, k in zip(seconds, ACCUMULATION, strict=True)]

    highest = max(max(each(slow[name])) for name in FILES) * 1.05

    def x_of(k: int) -> float:
        return left + (right - left) * (0.05 + 0.9 * math.log2(k) / math.log2(ACCUMULATION[-1]))

    def y_of(seconds: float) -> float:
        return bottom - (bottom - top) * seconds / highest

    write(left, 16 * scale, f"What a link of {MBIT} Mbit/s and {MS} ms costs", size=18, anchor="lt")
    told = "Seconds for each micro-step, two hosts of one rank; thin: the same with a fast link"
    write(left, 44 * scale, told, anchor="lt", fill="#555")
    for tick in (i / 2 for i in range(int(2 * highest) + 1)):
        pen.line([(left, y_of(tick)), (right, y_of(tick))], fill="#ddd", width=scale)
        write(left - 8 * scale, y_of(tick), f"{tick:.1f} s", anchor="rm")
    for k in ACCUMULATION:
        write(x_of(k), bottom + 8 * scale, str(k), anchor="mt")
    middle = (left + right) / 2
    write(middle, bottom + 32 * scale, "micro-steps of a step (gradient accumulation)", anchor="mt")
    label_at = -math.inf
    for name in sorted(FILES, key=lambda n: -slow[n][-1]):
        for seconds, thick in ((fast[name], 1), (slow[name], 3)):
            points = [(x_of(k), y_of(s)) for k, s in zip(ACCUMULATION, each(seconds), strict=True)]
            pen.line(points, fill=COLOURS[name], width=thick * scale, joint="curve")
        for x, y in points:
            r = 4 * scale
            pen.ellipse([x - r, y - r, x + r, y + r], fill=COLOURS[name])
        label_at = max(y, label_at + 18 * scale)
        pen.line([(x, y), (right + 8 * scale, label_at)], fill=COLOURS[name], width=scale)
        text = f"{name}.json  {each(slow[name])[-1]:.2f} s"
        write(right + 12 * scale, label_at, text, anchor="lm", fill=COLOURS[name])
    image.resize((width // scale, height // scale), Image.Resampling.LANCZOS).save(path)


def main() -> None:
    """Measure on two hosts without and with the slow link, and draw."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("links.png"), metavar="FILE.png")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)  # in the ranks
    args = parser.parse_args()
    if args.measure:
        measure(args.measure)
        return
    if reason := why_not():
        sys.exit(f"no hosts can be made here: {reason}")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        with Lab(folder / "lab", 2) as lab:
            fast = run(lab, folder / "fast.json")
            with lab.shape("n2", mbit=MBIT, ms=MS):
                slow = run(lab, folder / "slow.json")
    draw(fast, slow, args.out)
    print(table(fast, slow))
    print(json.dumps({"fast": fast, "slow": slow}))


if __name__ == "__main__":
    main()
