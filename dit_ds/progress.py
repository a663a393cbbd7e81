"""How far all ranks of an extraction are: a bar on rank 0, or lines where there is no terminal."""

from __future__ import annotations

import datetime
import sys
import time

import torch.distributed as dist
from tqdm import tqdm

from dit_ds import distributed

_LINE_SECONDS = 10


class Progress:
    """Shows the counters `images` and `work` of a `distributed.shared_store`.

    total: all work. What was done when this is made counts as done, but not for the rate.
    """

    def __init__(self, store: dist.Store, total: int) -> None:
        self._store, self._total = store, total
        self._began = self._told = time.monotonic()
        self._images, self._work = store.add("images", 0), store.add("work", 0)
        self._terminal = sys.stderr.isatty()
        self._bar = tqdm(
            total=total,
            initial=self._work,
            disable=not (distributed.is_main() and self._terminal),
            bar_format="{percentage:3.0f}%|{bar}| {postfix} [{elapsed}<{remaining}]",
        )

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def show(self) -> None:
        """Show where all ranks are, if it is time to."""
        now = time.monotonic()
        too_soon = not self._terminal and now - self._told < _LINE_SECONDS
        if not distributed.is_main() or too_soon:
            return
        self._told = now
        images, work = self._store.add("images", 0), self._store.add("work", 0)
        rate = f"{images} images, {(images - self._images) / (now - self._began):.1f} images/s"
        if self._terminal:
            self._bar.set_postfix_str(rate, refresh=False)
            self._bar.update(work - self._bar.n)
        elif work > self._work:
            seconds = (self._total - work) * (now - self._began) / (work - self._work)
            left = datetime.timedelta(seconds=round(seconds))
            print(f"{work / self._total:.0%}: {rate}, {left} left", flush=True)
