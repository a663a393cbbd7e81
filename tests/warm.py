"""Imported by the server that ranks are forked from, for what each of them would do again."""

from __future__ import annotations

import gc

import deepspeed.ops

# DeepSpeed asks at its first collective which of its ops would compile here.
assert deepspeed.ops.__compatible_ops__

# ZeRO-3 collects garbage when it starts: among the ranks' own objects is enough.
gc.collect()
gc.freeze()
