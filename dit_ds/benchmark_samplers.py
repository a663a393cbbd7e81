"""How good digits get by sampler and number of model calls, as figures and as a plot.

Of the models that `benchmark_digits.digits_learned` trains in the work folder, each sampled in all
ways that its objective knows. Run by `tools/benchmark.py samplers`.
"""

from __future__ import annotations

import math
import statistics
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from dit_ds import latents
from dit_ds.benchmark_digits import LR, STEPS, Training, score, train_all
from dit_ds.samplers import OF_DDPM, OF_FLOW, SamplerSettings

CALLS = (4, 8, 16, 32)
"""Of the model, for each image. Heun's sampler takes one less: two for each step but the last."""
OBJECTIVES = {"published": OF_DDPM, "modern": OF_FLOW}
Curves = dict[str, list[tuple[int, float]]]  # (calls, Frechet distance), by "recipe sampler"


def settings(sampler: str, calls: int) -> SamplerSettings:
    """The sampler with that many calls, or one less."""
    steps = calls // 2 if sampler == "heun" else calls
    return SamplerSettings(sampler=sampler, steps=steps, batch_size=300)  # type: ignore[arg-type]


def samplers(work: Path, *, repeats: int = 3) -> dict[str, float]:
    """Frechet distance by recipe, sampler and model calls, the mean of `repeats` seeds.

    Drawn as `samplers.png` in `work`.
    """
    trainings = {
        name: [Training(name, LR, steps, seed) for seed in range(repeats)]
        for name, steps in STEPS.items()
    }
    train_all(work, [t for seeds in trainings.values() for t in seeds])
    vae = latents.load_vae(work / "vae")
    curves: Curves = {}
    for name, ways in OBJECTIVES.items():
        for sampler in tqdm(ways, desc=name, disable=None, leave=False):
            for how in (settings(sampler, calls) for calls in CALLS):
                scores = [score(work, t, t.steps, vae, how) for t in trainings[name]]
                mean = statistics.mean(s["frechet_distance"] for s in scores)
                curves.setdefault(f"{name} {sampler}", []).append((how.num_calls, mean))
    draw(curves, work / "samplers.png")
    return {
        f"{name.replace(' ', '_')}_{calls}": distance
        for name, curve in curves.items()
        for calls, distance in curve
    }


# Of Okabe and Ito, told apart by all eyes.
_COLOURS = ("#000000", "#0072b2", "#d55e00", "#e69f00", "#009e73", "#cc79a7", "#56b4e9")


def draw(curves: Curves, path: Path) -> None:
    """A picture of the curves, both axes logarithmic."""
    scale = 2  # drawn large and made small: smooth lines
    width, height = 760 * scale, 450 * scale
    left, right, top, bottom = 60 * scale, 560 * scale, 70 * scale, 390 * scale
    image = Image.new("RGB", (width, height), "white")
    pen = ImageDraw.Draw(image)
    points = [point for curve in curves.values() for point in curve]
    x_ends = math.log(min(c for c, _ in points)), math.log(max(c for c, _ in points) + 1)
    y_ends = math.log(min(d for _, d in points) / 1.3), math.log(max(d for _, d in points) * 1.1)

    def write(x: float, y: float, text: str, *, size: int = 13, anchor: str, fill: str) -> None:
        font = ImageFont.load_default(size * scale)
        pen.text((x, y), text, font=font, anchor=anchor, fill=fill)

    def x_of(calls: int) -> float:
        return left + (right - left) * (math.log(calls) - x_ends[0]) / (x_ends[1] - x_ends[0])

    def y_of(distance: float) -> float:
        share = (math.log(distance) - y_ends[0]) / (y_ends[1] - y_ends[0])
        return bottom - (bottom - top) * share

    title = "Samplers on the digits: Frechet distance by model calls"
    write(left, 14 * scale, title, size=18, anchor="lt", fill="#222")
    write(left, 42 * scale, "Without guidance; lower is better", anchor="lt", fill="#555")
    for tick in (m * 10.0**e for e in range(-3, 4) for m in (1, 2, 5)):
        if y_ends[0] <= math.log(tick) <= y_ends[1]:
            pen.line([(left, y_of(tick)), (right, y_of(tick))], fill="#ddd", width=scale)
            write(left - 8 * scale, y_of(tick), f"{tick:g}", anchor="rm", fill="#222")
    for calls in CALLS:
        write(x_of(calls), bottom + 8 * scale, str(calls), anchor="mt", fill="#222")
    middle = (left + right) / 2
    write(middle, bottom + 30 * scale, "calls of the model for an image", anchor="mt", fill="#222")
    label_at = -math.inf
    colours = dict(zip(curves, _COLOURS, strict=False))
    for name, curve in sorted(curves.items(), key=lambda item: -item[1][-1][1]):
        places = [(x_of(calls), y_of(distance)) for calls, distance in curve]
        pen.line(places, fill=colours[name], width=3 * scale, joint="curve")
        r = 4 * scale
        for x, y in places:
            pen.ellipse([x - r, y - r, x + r, y + r], fill=colours[name])
        x, y = places[-1]
        label_at = max(y - 9 * scale * (len(curves) - 1), label_at + 18 * scale)
        pen.line([(x, y), (right + 8 * scale, label_at)], fill=colours[name], width=scale)
        told = f"{name}  {curve[-1][1]:.3f}"
        write(right + 12 * scale, label_at, told, anchor="lm", fill=colours[name])
    image.resize((width // scale, height // scale), Image.Resampling.LANCZOS).save(path)
