"""What an objective is given: the model as a callable, and a batch's labels and raw draws."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

Model = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(x, t, y) to its output; t: (N,)."""
Predict = Callable[[Tensor, float, Tensor], Tensor]
"""The same for samplers, with one timestep for all of the batch: a whole number for DDPM."""


class Batch(Protocol):
    """A micro-batch's labels and raw draws, one row for each sample."""

    @property
    def y(self) -> Tensor:
        """(N,) int64 classes."""

    @property
    def time(self) -> Tensor:
        """(N,) float32 uniform in [0, 1), mapped to a timestep."""

    @property
    def drop(self) -> Tensor:
        """(N,) float32 uniform in [0, 1), decides whether the class is dropped."""

    @property
    def noise(self) -> Tensor:
        """(N, C, H, W) float32 standard normal."""


def classes(batch: Batch, *, null_class: int, dropout: float) -> Tensor:
    """(N,) int64: the batch's classes, of which a share of `dropout` became the null class.

    Source: Ho & Salimans 2022, "Classifier-free diffusion guidance", algorithm 1.
    """
    return torch.where(batch.drop < dropout, null_class, batch.y)


def check(*, num_classes: int, class_dropout: float) -> None:
    """Raise ValueError for settings that are out of range."""
    if num_classes < 1:
        raise ValueError(f"num_classes={num_classes} must be at least 1")
    if not 0.0 <= class_dropout <= 1.0:
        raise ValueError(
            f"class_dropout={class_dropout} is a share; choose from 0 to 1, as a rule 0.1"
        )


def sample_mean(x: Tensor) -> Tensor:
    """Mean over all but the batch: (N, ...) to (N,)."""
    return x.flatten(1).mean(1)
