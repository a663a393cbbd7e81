"""The settings of a run: what the recipe owns (mathematics, batch, activation checkpointing).

A tree of sections, with defaults, bounds, and what must fit together. `config` loads it. No torch.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

import pydantic
import yaml
from pydantic import BaseModel, ConfigDict, Field

Positive = Annotated[int, Field(gt=0)]
NonNegative = Annotated[int, Field(ge=0)]
Probability = Annotated[float, Field(ge=0, le=1)]


class Section(BaseModel):
    """A part of the configuration: unknown keys are errors, values do not change after loading."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, serialize_by_alias=True
    )


class Data(Section):
    """Which latents, in which order. Image size, channels and classes come with the data."""

    path: str = ""
    """Folder or URL (s3://, gs://, https://, hf://) of a `manifest.json`."""
    cache: str | None = None
    """Folder on this machine's disk for shards from a URL. Default ~/.cache/dit_ds."""
    cache_gb: Annotated[float, Field(gt=0)] = 100.0
    """Most that the cache may hold (10^9 bytes): two windows of this machine's lanes, and this
    machine's part of `validation.path` if that is at a URL too."""
    lanes: Positive | None = None
    """Parallel lanes of the order; divides the global batch. Default gcd(global batch, 64)."""
    window: Positive = 16
    """Shards of a lane whose samples are shuffled together."""
    flip: Probability = 0.5
    """Share of samples taken from the horizontally flipped image."""
    allow_change: bool = False
    """Go on with a run on another data set than it was trained on."""
    workers: NonNegative = 2
    """Loader processes of each rank; 0 reads in the training process."""


class Model(Section):
    """The transformer: a name from the zoo (`DiT-XL/2`), or its sizes."""

    name: str | None = None
    patch_size: Positive | None = None
    hidden_size: Positive | None = None
    depth: Positive | None = None
    num_heads: Positive | None = None
    mlp_ratio: Annotated[float, Field(gt=0)] = 4.0
    learn_sigma: bool = True
    qk_norm: bool = False
    """RMS norm of each head's queries and keys, with a learned gain for each of its channels."""
    rope: bool = False
    """Rotary embedding of rows and columns in attention, beside the sine-cosine embedding."""
    mlp: Literal["gelu", "swiglu"] = "gelu"
    """With swiglu the hidden width is 2/3 of mlp_ratio's, so that parameters stay alike."""
    norm: Literal["layer", "rms"] = "layer"
    """Norm of the tokens before attention, MLP and the final layer."""
    fp32_norms: bool = False
    """Norms, their scale and their shift in float32 where the weights are in bf16 or fp16."""
    checkpoint_every: NonNegative = 0
    """Activation checkpointing: recompute every k-th block (1: all, 0: none)."""

    @pydantic.model_validator(mode="after")
    def _name_or_sizes(self) -> Model:
        sizes = {k: getattr(self, k) for k in ("patch_size", "hidden_size", "depth", "num_heads")}
        missing = [k for k, v in sizes.items() if v is None]
        if self.name is not None and len(missing) < len(sizes):
            given = next(k for k, v in sizes.items() if v is not None)
            raise ValueError(
                f"model.name={self.name} already fixes model.{given}={sizes[given]}; "
                "choose one of the two: model.name=null for the sizes, or for the name "
                + " ".join(f"model.{k}=null" for k in sizes)
            )
        if self.name is None and missing:
            raise ValueError(
                f"model.{missing[0]} is not set; give a model.name such as DiT-B/2, or all of "
                + ", ".join(f"model.{k}" for k in sizes)
            )
        return self


class Init(Section):
    """What the weights of a new run start from. A run that is resumed goes on from its own."""

    from_: str = Field(default="", alias="from")
    """An export, a run, a `.pt` file in the published layout, or a diffusers folder; empty for the
    initial values of the paper."""


class Objective(Section):
    """What is learned: DDPM, as published unless options are set, or flow matching."""

    name: Literal["ddpm", "flow"] = "ddpm"
    num_timesteps: Annotated[int, Field(ge=2, le=1_000_000)] = 1000
    """Of ddpm: steps of the schedule. Of flow: what pure noise is told the model as."""
    class_dropout: Probability = 0.1
    """Share of labels replaced by the null class, for classifier-free guidance."""
    prediction: Literal["eps", "v"] | None = None
    """Of ddpm: the noise, or the velocity sqrt(a) eps - sqrt(1 - a) x_0; eps unless set."""
    schedule: Literal["linear", "cosine"] | None = None
    """Of ddpm: how the signal falls; linear unless set."""
    min_snr_gamma: Annotated[float, Field(gt=0)] | None = None
    """Of ddpm: no step counts for more than this signal-to-noise ratio; all alike unless set."""
    time: Literal["uniform", "logit-normal", "cosmap"] | None = None
    """Of flow: how often each time is trained; uniform unless set."""
    logit_mean: float | None = None
    """Of logit-normal: mean of the logit of t, above 0 towards noise; 0 unless set."""
    logit_std: Annotated[float, Field(gt=0)] | None = None
    """Of logit-normal: standard deviation of the logit of t; 1 unless set."""
    shift: Annotated[float, Field(gt=0)] | Literal["resolution"] | None = None
    """Of flow: moves times towards noise, in training and sampling, 1 unless set; `resolution` is
    sqrt(H W) / 32 of the latents, 1 for images of 256 x 256."""

    @pydantic.model_validator(mode="before")
    @classmethod
    def _defaults(cls, tree: Any) -> Any:
        if not isinstance(tree, dict):
            return tree
        defaults = _FLOW if tree.get("name", "ddpm") == "flow" else _DDPM
        if tree.get("time") == "logit-normal":
            defaults = defaults | _LOGIT_NORMAL
        return defaults | {k: v for k, v in tree.items() if v is not None or k not in defaults}

    @pydantic.model_validator(mode="after")
    def _applies(self) -> Objective:
        for key, name in (
            *((key, "ddpm") for key in ("prediction", "schedule", "min_snr_gamma")),
            *((key, "flow") for key in ("time", "shift", "logit_mean", "logit_std")),
        ):
            value = getattr(self, key)
            if value is not None and self.name != name:
                raise ValueError(
                    f"objective.{key}={value} has no meaning for objective.name={self.name}; leave "
                    f"it out, or set objective.name={name}"
                )
        for key in _LOGIT_NORMAL:
            value = getattr(self, key)
            if value is not None and self.time != "logit-normal":
                raise ValueError(
                    f"objective.{key}={value} has no meaning for objective.time={self.time}; leave "
                    "it out, or set objective.time=logit-normal"
                )
        return self


_DDPM: dict[str, Any] = {"prediction": "eps", "schedule": "linear"}
_FLOW: dict[str, Any] = {"time": "uniform", "shift": 1.0}
_LOGIT_NORMAL = {"logit_mean": 0.0, "logit_std": 1.0}


class Optimizer(Section):
    """An optimizer with an exponential moving average of the weights, and its learning rate."""

    name: Literal["adamw", "sophiag", "muon"] = "adamw"
    """muon: for the matrices of the blocks, with AdamW for the rest (see `muon.Muon`)."""
    lr: Annotated[float, Field(gt=0)] = 1e-4
    """With sophiag 2e-4 unless set."""
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (
        0.9,
        0.999,
    )
    """Of the mean of gradients, and of that of their squares, or of Sophia's Hessian. With sophiag
    (0.965, 0.99) unless set."""
    eps: Annotated[float, Field(gt=0)] = 1e-8
    """Least denominator. With sophiag, where curvatures are small, 1e-12 unless set."""
    momentum: Annotated[float, Field(ge=0, lt=1)] | None = None
    """Of muon: that of the matrices it trains; 0.95 unless set. The rest is AdamW's, with betas."""
    rho: Annotated[float, Field(gt=0)] | None = None
    """Of sophiag: how far a coordinate may trust its curvature (see `optim.SophiaG`); 0.01 unless
    set."""
    hessian_every: Positive | None = None
    """Of sophiag: steps between two estimates of the curvature; 10 unless set."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    gradient_clipping: Annotated[float, Field(ge=0)] = 1.0
    """Largest global gradient norm; 0 leaves gradients as they are."""
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = 0.9999
    schedule: Literal["constant", "cosine"] = "constant"
    """After the warm-up: stay, or fall to zero at train.steps along a half cosine."""
    warmup_steps: NonNegative = 0

    @pydantic.model_validator(mode="before")
    @classmethod
    def _defaults(cls, tree: Any) -> Any:
        if isinstance(tree, dict) and tree.get("name") in ("sophiag", "muon"):
            return (_SOPHIAG if tree["name"] == "sophiag" else _MUON) | tree
        return tree

    @pydantic.model_validator(mode="after")
    def _applies(self) -> Optimizer:
        for key, name in (("rho", "sophiag"), ("hessian_every", "sophiag"), ("momentum", "muon")):
            value = getattr(self, key)
            if value is not None and self.name != name:
                raise ValueError(
                    f"optimizer.{key}={value} has no meaning for optimizer.name={self.name}; leave "
                    f"it out, or set optimizer.name={name}"
                )
            if value is None and self.name == name:
                raise ValueError(f"optimizer.{key} must be set; leave it out for the default")
        return self


_LONGEST = 12**-0.5  # the plain mean of all steps

Length = Annotated[float, Field(gt=0, le=_LONGEST)]
"""Of a power-function average: the standard deviation of its profile over the time trained."""


class PostHocEMA(Section):
    """Two more averages, with snapshots from which one of any length is made after the training.

    Source: Karras et al. 2024, "Analyzing and Improving the Training Dynamics of Diffusion Models".
    """

    every: NonNegative = 0
    """Steps between two snapshots, all of which stay (8 bytes for each parameter); 0 for none, and
    then no such average is kept."""
    lengths: tuple[Length, Length] = (0.05, 0.10)
    """Of the two averages, the shorter one first."""

    @pydantic.model_validator(mode="after")
    def _applies(self) -> PostHocEMA:
        short, long = self.lengths
        if long < 1.1 * short:
            raise ValueError(
                f"post_hoc_ema.lengths={short, long} are too near each other, or not in order; "
                f"choose e.g. {short, 2 * short}"
            )
        if not self.every and self.lengths != type(self).model_fields["lengths"].default:
            raise ValueError(
                f"post_hoc_ema.lengths={short, long} has no meaning without snapshots; set "
                "post_hoc_ema.every too, or leave it out"
            )
        return self


_SOPHIAG = {"lr": 2e-4, "betas": (0.965, 0.99), "eps": 1e-12, "rho": 0.01, "hessian_every": 10}
_MUON = {"momentum": 0.95}


class Train(Section):
    """Length, batch and housekeeping."""

    steps: Positive = 400_000
    global_batch_size: Positive = 256
    """Samples of one optimizer step, over all ranks and micro-steps."""
    micro_batch_size: Positive = 32
    """Most samples that one rank holds at a time; gradients accumulate over the rest."""
    expect_ranks: Positive | None = None
    """Refuse to start with another number of ranks."""
    stop_after_hours: Annotated[float, Field(gt=0)] | None = None
    """Save and end in good order after this time, for queues with a limit."""
    log_every: Positive = 100
    checkpoint_every: Positive = 10_000
    """Steps between two checkpoints. Training does not wait while they are written."""
    keep_checkpoints: Positive = 3
    """How many of the newest stay."""
    keep_every: NonNegative = 0
    """Those whose step is a multiple of this stay too; 0 for none."""
    keep_best: Literal["validation/loss", "validation_ema/loss"] | None = None
    """The one with the least of this metric stays too."""


Sampler = Literal["ddpm", "ddim", "dpm++", "euler", "heun", "sde"]
"""The first two are of the objective ddpm, the last three of flow; dpm++ is of both."""


class Preview(Section):
    """Sample grids during training, from the averaged weights and the same noise every time."""

    every: NonNegative = 0
    """Steps between two grids; 0 for none."""
    vae: str | None = None
    """Decoder: a folder or hub id. Default: the one that the manifest names."""
    classes: Positive = 8
    per_class: Positive = 4
    cfg_scale: Annotated[float, Field(ge=0)] = 4.0
    steps: Positive = 50
    sampler: Sampler | None = None
    """ddim unless set, or euler where the objective is flow."""


class Validation(Section):
    """Loss on other data during training, on the same noise and timesteps every time."""

    path: str = ""
    """Folder or URL of a `manifest.json`, as `tools/shards.py split` makes it; empty for none."""
    every: Positive = 5_000
    """Steps between two evaluations."""


class Config(Section):
    """Everything that the recipe owns."""

    name: str = Field("dit", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """The run directory is `runs/NAME` unless `--run` says otherwise."""
    seed: int = 0
    data: Data = Data()
    model: Model
    init: Init = Init()
    objective: Objective = Objective()
    optimizer: Optimizer = Optimizer()
    post_hoc_ema: PostHocEMA = PostHocEMA()
    train: Train = Train()
    preview: Preview = Preview()
    validation: Validation = Validation()

    @property
    def lanes(self) -> int:
        """Number of lanes that the order is cut into."""
        return self.data.lanes or math.gcd(self.train.global_batch_size, 64)

    @pydantic.model_validator(mode="before")
    @classmethod
    def _no_variance_of_flow(cls, tree: Any) -> Any:
        if isinstance(tree, dict):
            objective, model = tree.get("objective"), tree.get("model")
            if isinstance(objective, dict) and isinstance(model, dict):
                if objective.get("name") == "flow":
                    return tree | {"model": {"learn_sigma": False} | model}
        return tree

    @pydantic.model_validator(mode="after")
    def _fits_together(self) -> Config:
        if self.objective.name == "flow" and self.model.learn_sigma:
            raise ValueError(
                "model.learn_sigma=True has no meaning for objective.name=flow, which has no "
                "variance to learn; leave it out"
            )
        batch = self.train.global_batch_size
        if batch % self.lanes:
            raise ValueError(
                f"data.lanes={self.lanes} does not divide train.global_batch_size={batch}; "
                f"leave it out for {math.gcd(batch, 64)}"
            )
        if self.post_hoc_ema.every > self.train.steps:
            raise ValueError(
                f"post_hoc_ema.every={self.post_hoc_ema.every} makes no snapshot in "
                f"train.steps={self.train.steps}; choose e.g. {max(1, self.train.steps // 16)}"
            )
        every = self.train.checkpoint_every
        if self.train.keep_every % every:
            raise ValueError(
                f"train.keep_every={self.train.keep_every} is not a multiple of "
                f"train.checkpoint_every={every}; choose e.g. {every * 10}"
            )
        if self.train.keep_best and not self.validation.path:
            raise ValueError(
                f"train.keep_best={self.train.keep_best} needs validation.path; set it to a data "
                "set that `tools/shards.py split` made"
            )
        if self.train.keep_best and every % self.validation.every:
            raise ValueError(
                f"train.keep_best={self.train.keep_best} needs a validation at every checkpoint, "
                f"but validation.every={self.validation.every} does not divide "
                f"train.checkpoint_every={every}; set validation.every={every}"
            )
        if self.optimizer.schedule == "cosine" and self.optimizer.warmup_steps >= self.train.steps:
            raise ValueError(
                f"optimizer.warmup_steps={self.optimizer.warmup_steps} leaves the cosine no step "
                f"of train.steps={self.train.steps}; shorten the warm-up"
            )
        return self

    def to_yaml(self) -> str:
        """The resolved configuration, as it is written into the run directory."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)
