"""The parameter lists that are measured, and their data."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

__all__ = ["CASES", "Array", "Case", "dtype_of"]

Array: TypeAlias = npt.NDArray[Any]
Shape: TypeAlias = tuple[int, ...]

# What PyTorch and JAX align memory to; NumPy's own allocations are aligned to 16 only, which makes
# every 64-byte load of a large array touch two cache lines. The roofline is highest on aligned memory.
_ALIGNMENT = 64


@dataclass(frozen=True)
class Case:
    """A list of gradients.

    Attributes:
        key: Its name on the command line and in result files.
        title: Its name in tables.
        source: Where the shapes come from.
        shapes: One shape per gradient.
        dtype: ``float32``, ``float16`` or ``bfloat16``.
        in_cache: Measured again and again on the same memory, so that it comes from the caches as far as
            it fits. Else the caches are filled with other data before every call.
        peers: Whether other libraries take part.
    """

    key: str
    title: str
    source: str
    shapes: tuple[Shape, ...]
    dtype: str = "float32"
    in_cache: bool = True
    peers: bool = True

    @property
    def num_elements(self) -> int:
        return sum(math.prod(shape) for shape in self.shapes)

    @property
    def nbytes(self) -> int:
        return self.num_elements * dtype_of(self.dtype).itemsize

    def make(self) -> list[Array]:
        """The gradients: normally distributed, the same in every run, each in memory of its own."""
        rng = np.random.default_rng(20190214)
        grads = []
        for shape in self.shapes:
            grad = _aligned_empty(shape, dtype_of(self.dtype))
            if grad.dtype == np.float32:
                rng.standard_normal(dtype=np.float32, out=grad)
            else:
                grad[...] = rng.standard_normal(shape, dtype=np.float32)
            grads.append(grad)
        return grads


def dtype_of(name: str) -> np.dtype[Any]:
    """The NumPy dtype of this name; ``bfloat16`` comes from ml_dtypes."""
    if name == "bfloat16":
        import ml_dtypes  # noqa: PLC0415

        bfloat16: np.dtype[Any] = np.dtype(ml_dtypes.bfloat16)
        return bfloat16
    return np.dtype(name)


def _aligned_empty(shape: Shape, dtype: np.dtype[Any]) -> Array:
    nbytes = math.prod(shape) * dtype.itemsize
    memory = np.empty(nbytes + _ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % _ALIGNMENT
    return memory[start : start + nbytes].view(dtype).reshape(shape)


def _gpt2_shapes(width: int = 768) -> tuple[Shape, ...]:
    """The parameters of GPT-2 124M; the output layer shares the token embedding."""
    block: tuple[Shape, ...] = (
        (width,), (width,),  # ln_1: weight, bias
        (width, 3 * width), (3 * width,),  # attn.c_attn
        (width, width), (width,),  # attn.c_proj
        (width,), (width,),  # ln_2
        (width, 4 * width), (4 * width,),  # mlp.c_fc
        (4 * width, width), (width,),  # mlp.c_proj
    )  # fmt: skip
    return ((50257, width), (1024, width), *block * 12, (width,), (width,))


def _half(shape: Shape) -> Shape:
    return (*shape[:-1], shape[-1] // 2)


_GPT2 = (
    "Radford et al. 2019, Language Models are Unsupervised Multitask Learners, smallest model; "
    "sizes as in github.com/openai/gpt-2, src/model.py: 12 layers, width 768, context 1024, "
    "vocabulary 50257"
)


def _mlp_shapes(layers: int, width: int) -> tuple[Shape, ...]:
    return ((width, width), (width,)) * layers


CASES: dict[str, Case] = {
    case.key: case
    for case in (
        Case("gpt2", "GPT-2 124M, 148 arrays, 498 MB", _GPT2, _gpt2_shapes(), in_cache=False),
        Case("mlp", "80 arrays, 5.4 MB", "weights and biases of 40 layers, width 183", _mlp_shapes(40, 183)),
        Case("tiny", "300 arrays of 64", "synthetic", ((64,),) * 300),
        Case("many", "20 000 arrays of 100", "synthetic", ((100,),) * 20_000),
        Case("fewer", "2 000 arrays of 100", "synthetic", ((100,),) * 2_000, peers=False),
        # The same bytes in three dtypes: half the elements of GPT-2 in float32.
        Case(
            "float32",
            "float32, 249 MB",
            f"half of every gradient of: {_GPT2}",
            tuple(map(_half, _gpt2_shapes())),
            in_cache=False,
            peers=False,
        ),
        Case("bfloat16", "bfloat16, 249 MB", _GPT2, _gpt2_shapes(), "bfloat16", in_cache=False, peers=False),
        Case("float16", "float16, 249 MB", _GPT2, _gpt2_shapes(), "float16", in_cache=False, peers=False),
    )
}
