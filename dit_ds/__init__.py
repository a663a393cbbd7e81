"""dit_ds: diffusion transformers trained at scale with DeepSpeed."""

__version__ = "0.4.0"
