"""What a checkpoint's index.json says: these fields, of these types, within bounds."""

from __future__ import annotations

import hashlib
import json
import math
from typing import Annotated, Any

import pydantic
from pydantic import Field

FORMAT = 2
MOST_BYTES = 1 << 26
"""No index is larger: it would be of 400 parameters on 2,000 ranks at stage 3."""
NAME = r"^[\w./+:-]{1,200}$"

_FIRST_FAULT = Field(fail_fast=True)  # millions of faults would be gigabytes of sentences

Count = Annotated[int, Field(ge=0, lt=2**53)]
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Name = Annotated[str, Field(pattern=NAME)]
Key = Annotated[str, Field(pattern=r"^\w{1,50}$")]  # with a slash, two tensors could have one name
Range = tuple[Count, Annotated[int, Field(gt=0, lt=2**53)]]
"""First element, and how many."""


class Strict(pydantic.BaseModel):
    """Holds the declared fields and types, as JSON has them, and nothing else."""

    model_config = pydantic.ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False
    )


class File(Strict):
    """A file of a checkpoint: its size, the sha256 of each chunk, and its ranges of parameters."""

    num_bytes: Count
    sha256: Annotated[list[Digest], _FIRST_FAULT]
    ranges: dict[Name, Range] = {}


class Parameter(Strict):
    """A trained parameter: its shape, and the state that is one number (the optimizer's step)."""

    shape: Annotated[list[Count], Field(max_length=16)]
    scalars: dict[Key, float] = {}

    @property
    def numel(self) -> int:
        """Number of values."""
        return math.prod(self.shape)


class Engine(Strict):
    """DeepSpeed's counters."""

    global_steps: Count
    global_samples: Count
    skipped_steps: Count


class Index(Strict):
    """index.json, but for its own checksum."""

    format: int
    dit_ds: Name
    saved_at: Name
    """UTC, ISO 8601."""
    step: Count
    world_size: Annotated[int, Field(gt=0)]
    zero_stage: Annotated[int, Field(ge=0, le=3)]
    engine: Engine
    loss_scaler: dict[Key, float]
    groups: Annotated[list[dict[str, pydantic.JsonValue]], _FIRST_FAULT]
    """Hyper-parameters of the optimizer's groups."""
    keys: Annotated[list[Key], _FIRST_FAULT]
    """Which state every parameter has: `fp32`, `exp_avg`, `ema`, ..."""
    parameters: dict[Name, Parameter]
    metrics: dict[Name, float]
    """What was measured at this step, as `validation/loss`."""
    about: dict[str, pydantic.JsonValue]
    """What the saver handed over: configuration, data set, how to use the weights."""
    files: dict[Annotated[str, Field(pattern=r"^(rank-\d{5}|module)\.safetensors$")], File]


def checksum(tree: dict[str, Any]) -> str:
    """sha256 of everything in an index but this checksum itself."""
    content = {key: value for key, value in tree.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def index_text(index: Index) -> str:
    """The content of index.json.

    Raises:
        ValueError: larger than will be read.
    """
    tree = index.model_dump(mode="json")
    text = json.dumps(tree | {"sha256": checksum(tree)})
    if len(text) > MOST_BYTES:
        raise ValueError(f"its index has {len(text)} bytes, more than {MOST_BYTES}")
    return text


def fault_of(error: pydantic.ValidationError) -> str:
    """The first fault, short and printable: what is in it may be anyone's."""
    if error.error_count() > 100:  # a list of all, to tell the first, could fill the memory
        return f"{error.error_count()} faults"
    fault = error.errors(include_input=False)[0]
    return f"{'.'.join(map(str, fault['loc']))!r:.200}: {fault['msg']!s:.200}"
