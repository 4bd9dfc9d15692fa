"""gradclip inside of compiled JAX programs, and as transformations of optax. See ``docs/jax.md``."""

from gradclip._public import claim
from gradclip.jax._functions import ClipResult, Measured, clip, global_norm, measure, named_norms, tree_norms
from gradclip.jax._transforms import (
    ClipState,
    adaptive_grad_clip,
    clip_by_block_rms,
    clip_by_global_norm,
    clip_by_norm,
    clip_by_value,
    per_example_global_norm_clip,
)

__all__ = [
    "ClipResult",
    "ClipState",
    "Measured",
    "adaptive_grad_clip",
    "clip",
    "clip_by_block_rms",
    "clip_by_global_norm",
    "clip_by_norm",
    "clip_by_value",
    "global_norm",
    "measure",
    "named_norms",
    "per_example_global_norm_clip",
    "tree_norms",
]

claim(__name__)
