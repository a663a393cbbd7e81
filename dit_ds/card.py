"""The model card of exported weights: what they are, how they were made, and what is not known."""

from __future__ import annotations

from dit_ds.export import Description
from dit_ds.models import DIT_MODELS

UNKNOWN = "unknown"


def model_card(
    about: Description, *, num_parameters: int, vae_told: str, timesteps: list[int] | None = None
) -> str:
    """Markdown with a head of YAML, as hubs read it; of a folder for diffusers.

    Args:
        about: of the weights.
        num_parameters: of the model.
        vae_told: what is known of the decoder in the folder.
        timesteps: those for which alone the folder's timestep embedding is right.
    """
    high, wide = about.image_shape
    rows = {
        "model": f"{_name(about)}, {num_parameters:,} parameters, patches of "
        f"{about.model.patch_size}",
        "images": f"{high} x {wide} pixels, {about.num_classes} classes",
        "data set": f"fingerprint `{about.dataset}`" if about.dataset else UNKNOWN,
        "trained for": (
            f"{about.step:,} steps, {about.images_seen:,} images" if about.dataset else UNKNOWN
        ),
        "objective": _objective(about),
        "weights": _average(about),
        "guidance": _guidance(about),
        "metrics": _metrics(about),
        "decoder": vae_told,
    }
    table = "\n".join(f"| {key} | {_cell(value)} |" for key, value in rows.items())
    return f"{_HEAD}# {_name(about)}\n\n| | |\n| --- | --- |\n{table}\n\n{_use(timesteps)}"


def _name(about: Description) -> str:
    sizes = about.model.model_dump()
    for name, zoo in DIT_MODELS.items():
        if all(sizes[key] == value for key, value in zoo.items()):
            return name
    return f"DiT of {about.model.depth} blocks of {about.model.hidden_size} channels"


def _objective(about: Description) -> str:
    settings = about.objective.model_dump(exclude_none=True, exclude={"class_dropout"})
    told = ", ".join(f"{key} {value}" for key, value in settings.items())
    told += ", learned variance" if about.model.learn_sigma else ", fixed variance"
    return told if about.dataset else f"{told}; assumed, the file that was imported does not tell"


def _average(about: Description) -> str:
    if about.ema_length is not None:
        return f"power-function EMA of relative length {about.ema_length}"
    if about.ema_decay is not None:
        return f"EMA of decay {about.ema_decay}"
    return "whether averaged, and how: unknown"


def _guidance(about: Description) -> str:
    share = about.objective.class_dropout
    if not about.dataset or not about.class_dropout_known:
        return "unknown how many labels were dropped in training; scale and interval are a choice"
    if share == 0:
        return "none: no label was dropped in training, so the null class means nothing"
    return (
        f"classifier-free: {share:.0%} of the labels were dropped in training; scale and interval "
        "are a choice at sampling"
    )


def _metrics(about: Description) -> str:
    found = ", ".join(f"{key} {value:.5g}" for key, value in sorted(about.metrics.items()))
    return f"{found} at this step; no other is known" if found else "none is known"


def _cell(text: str) -> str:
    return text.replace("|", r"\|").replace("\n", " ")


def _use(timesteps: list[int] | None) -> str:
    if timesteps is None:
        return _EXACT
    return _STOCK.format(steps=len(timesteps), timesteps=", ".join(map(str, timesteps)))


_HEAD = """---
library_name: diffusers
pipeline_tag: unconditional-image-generation
tags: [dit, class-conditional]
---

"""
_EXACT = """## Use

```python
import diffusers

import dit_ds.diffusers_model  # the exact model; diffusers' own is another function

pipeline = diffusers.DiTPipeline.from_pretrained("THIS_FOLDER")
images = pipeline(class_labels=[0], guidance_scale=4.0, num_inference_steps=50).images
```

`pipeline.labels` has the names of the classes. Class c is row c of the label table, or c + 1 from
1000 on, because the pipeline takes 1000 for the null class.
"""
_STOCK = """## Use

```python
import diffusers

pipeline = diffusers.DiTPipeline.from_pretrained("THIS_FOLDER")
images = pipeline(class_labels=[0], guidance_scale=4.0, num_inference_steps={steps}).images
```

**For {steps} steps of the scheduler in this folder only.** diffusers embeds timesteps otherwise
than this model was trained with, and the weights here make up for it at these timesteps and no
others: {timesteps}. They are for sampling, and cannot be imported again.

`pipeline.labels` has the names of the classes. Class c is row c of the label table, or c + 1 from
1000 on, because the pipeline takes 1000 for the null class.
"""
