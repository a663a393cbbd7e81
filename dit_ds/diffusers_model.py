"""diffusers' DiT with the published numerics, for `DiTPipeline` folders of `tools/export.py`.

    import dit_ds.diffusers_model
    pipeline = diffusers.DiTPipeline.from_pretrained(FOLDER)

diffusers' own class is another function of the same tensors: its timestep frequencies end at
1/10000, where the published ones stop one short of it, and one of the two norms in a block has
eps 1e-5 for 1e-6.
"""

from __future__ import annotations

from diffusers import (
    DiTTransformer2DModel,
    ModelMixin,  # the pipeline looks here for the base class whose `from_pretrained` it is to use
)
from diffusers.configuration_utils import register_to_config
from diffusers.models.embeddings import Timesteps

__all__ = ["ModelMixin", "PublishedDiT"]


class PublishedDiT(DiTTransformer2DModel):
    """`DiTTransformer2DModel` that computes what `dit_ds.models.DiT` does, up to rounding.

    Labels are rows of the table: the null class is row 1000 (`dit_ds.layouts`). The position
    embedding is kept with the weights.
    """

    @register_to_config
    def __init__(
        self,
        num_attention_heads: int = 16,
        attention_head_dim: int = 72,
        in_channels: int = 4,
        out_channels: int = 8,
        num_layers: int = 28,
        sample_size: int = 32,
        patch_size: int = 2,
        num_embeds_ada_norm: int = 1000,
        num_classes: int = 1000,  # kept in the config: fewer than the table has rows
    ) -> None:
        super().__init__(
            num_attention_heads=num_attention_heads,
            attention_head_dim=attention_head_dim,
            in_channels=in_channels,
            out_channels=out_channels,
            num_layers=num_layers,
            sample_size=sample_size,
            patch_size=patch_size,
            num_embeds_ada_norm=num_embeds_ada_norm,
            norm_eps=1e-6,
        )
        for block in self.transformer_blocks:
            block.norm1.emb.time_proj = Timesteps(256, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.pos_embed.register_buffer("pos_embed", self.pos_embed.pos_embed, persistent=True)
