"""gradclip inside of compiled JAX programs."""

from gradclip.jax._functions import ClipResult, Measured, clip, global_norm, measure, named_norms, tree_norms

__all__ = ["ClipResult", "Measured", "clip", "global_norm", "measure", "named_norms", "tree_norms"]
