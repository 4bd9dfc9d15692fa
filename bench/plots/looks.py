"""How contenders look in every plot."""

from __future__ import annotations

from gradclip._report.style import BLACK, BLUE, GREEN, OURS, PLAN, PURPLE, SKY

__all__ = ["LOOKS", "MACHINE"]

# Variants of a library have its colour, and markers of their own.
LOOKS: dict[str, tuple[str, str, str]] = {
    "gradclip": (OURS, "o", "-"),
    "gradclip-plan": (PLAN, "o", "-"),
    "gradclip-measured": (OURS, "d", ":"),
    "gradclip-unbound": (PLAN, "d", ":"),
    "gradclip-torch": (OURS, "X", "--"),
    "gradclip-jax": (OURS, "P", "--"),
    "numpy-dot": (BLUE, "s", "-"),
    "numpy-sum": (BLUE, "D", "--"),
    "numba": (BLACK, "P", ":"),
    "torch": (GREEN, "^", "-"),
    "torch-loop": (GREEN, "v", "--"),
    "optax": (PURPLE, "<", "--"),
    "optax-donated": (PURPLE, ">", "-"),
    "gradclip-gpu": (OURS, "o", "-"),
    "gradclip-gpu-plan": (PLAN, "o", "-"),
    "gradclip-torch-cuda": (OURS, "X", "--"),
    "cupy-nrm2": (BLUE, "s", "-"),
    "cupy-sum": (BLUE, "D", "--"),
    "torch-cuda": (GREEN, "^", "-"),
    "torch-cuda-loop": (GREEN, "v", "--"),
    "apex": (SKY, "X", "-"),
    "transformer-engine": (BLACK, "P", ":"),
}
MACHINE = "machine's own"
