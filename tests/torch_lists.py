"""Lists of gradients as PyTorch makes them: every dtype, layout and container, drawn by hypothesis."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from matrices import Array

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.complex128)
REAL = DTYPES[:4]
_SHAPES = ((), (1,), (7,), (33,), (5, 9), (3, 4, 5))
_EMPTY = ((0,), (3, 0, 2))
TORCH_VERSION = tuple(map(int, torch.__version__.split("+")[0].split(".")[:2]))
# What PyTorch says of its own sparse tensors, once in a process.
SPARSE_WARNINGS = [
    pytest.mark.filterwarnings("ignore:Sparse invariant checks are implicitly disabled"),
    pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta"),
]
_UNTOUCHED = 7.0  # between the elements of a view


def eps(dtype: torch.dtype) -> float:
    """One unit in the last place, relative."""
    return float(torch.finfo(dtype).eps)


def array_of(tensor: Tensor) -> Array:
    """A copy of the elements that a clip may change, in one dimension, for NumPy."""
    if tensor.layout is torch.sparse_coo:
        tensor = tensor.coalesce().values()
    elif tensor.layout is not torch.strided:
        tensor = tensor.values()
    flat = tensor.detach().resolve_conj().resolve_neg().reshape(-1).clone()
    if flat.dtype is torch.bfloat16:
        return flat.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    found: Array = flat.numpy()
    return found


def in_memory_order(tensor: Tensor) -> Array:
    """The same elements in the order in which they lie, which is the one that a norm is summed in."""
    if tensor.layout is not torch.strided:
        return array_of(tensor)
    return array_of(tensor.permute(sorted(range(tensor.dim()), key=tensor.stride, reverse=True)))


def tensor_of(array: Array) -> Tensor:
    """The other way round."""
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view("i2").copy()).view(torch.bfloat16)
    return torch.from_numpy(array.copy())


def parameter(grad: Tensor | None, shape: Sequence[int] = ()) -> Tensor:
    """A leaf with that gradient."""
    if grad is None:
        return torch.nn.Parameter(torch.zeros(shape))
    if grad.layout in (torch.sparse_csr, torch.sparse_csc):
        leaf = torch.zeros_like(grad).requires_grad_()
    else:
        leaf = torch.nn.Parameter(torch.zeros(grad.shape, dtype=grad.dtype))
    leaf.grad = grad
    return leaf


def grad_of(leaf: Tensor) -> Tensor:
    """Its gradient, which there is."""
    assert leaf.grad is not None
    return leaf.grad


# --- Layouts ------------------------------------------------------------------------------------------


def _within(values: Tensor, widen: Callable[[Tensor], tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    view, base = widen(values)
    view.copy_(values)
    return view, base


def _buffer(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.full(shape, _UNTOUCHED, dtype=dtype)


def _every_second(values: Tensor) -> tuple[Tensor, Tensor]:
    base = _buffer(*values.shape[:-1], 2 * values.shape[-1], dtype=values.dtype)
    return base[..., ::2], base


def _padded(values: Tensor) -> tuple[Tensor, Tensor]:
    base = _buffer(*values.shape[:-1], values.shape[-1] + 3, dtype=values.dtype)
    return base[..., 1:-2], base


def _transposed(values: Tensor) -> tuple[Tensor, Tensor]:
    base = _buffer(*reversed(values.shape), dtype=values.dtype)
    return base.permute(*reversed(range(base.dim()))), base


def _channels_last(values: Tensor) -> tuple[Tensor, Tensor]:
    if not values.numel():
        return values, values
    lifted = values.reshape(1, -1, *values.shape[-2:]) if values.dim() > 1 else values.reshape(1, 1, 1, -1)
    whole = lifted.to(memory_format=torch.channels_last).clone(memory_format=torch.preserve_format)
    return whole, whole


_DENSE: dict[str, Callable[[Tensor], tuple[Tensor, Tensor]]] = {
    "contiguous": lambda values: (values, values),
    "transposed": lambda values: _within(values, _transposed) if values.dim() else (values, values),
    "channels last": _channels_last,
    "every second": lambda values: _within(values, _every_second) if values.dim() else (values, values),
    "padded": lambda values: _within(values, _padded) if values.dim() else (values, values),
}


def _sparse(values: Tensor, coalesced: bool) -> tuple[Tensor, Tensor]:
    count = values.numel()
    rows = torch.arange(count) * 3
    found = torch.sparse_coo_tensor(rows[None], values.reshape(-1), (3 * count + 1,), dtype=values.dtype)
    if coalesced:
        return found.coalesce(), values
    # The first index once more, with 0: the sums are exact.
    twice = torch.cat([rows, rows[:1]])
    padded = torch.cat([values.reshape(-1), torch.zeros(min(1, count), dtype=values.dtype)])
    return torch.sparse_coo_tensor(twice[None], padded, (3 * count + 1,), dtype=values.dtype), values


def _compressed(values: Tensor) -> tuple[Tensor, Tensor]:
    count = values.numel()
    found = torch.sparse_csr_tensor(
        torch.tensor([0, count]), torch.arange(count), values.reshape(-1).clone(), (1, count + 2)
    )
    return found, values


LAYOUTS: dict[str, Callable[[Tensor], tuple[Tensor, Tensor]]] = {
    **_DENSE,
    "conjugate view": lambda values: (values.conj(), values),
    "sparse": lambda values: _sparse(values, coalesced=True),
    "sparse, not coalesced": lambda values: _sparse(values, coalesced=False),
    "CSR": _compressed,
}


@dataclass
class Gradient:
    """A gradient, and the memory around it."""

    layout: str
    grad: Tensor
    base: Tensor

    def gaps(self) -> list[float]:
        """What lies between the elements of a view; it must stay as it was."""
        if self.layout not in ("every second", "padded") or not self.grad.dim():
            return []
        gap = torch.ones_like(self.base, dtype=torch.bool)
        (gap[..., ::2] if self.layout == "every second" else gap[..., 1:-2])[...] = False
        return [abs(complex(x) - _UNTOUCHED) for x in self.base[gap].tolist()]


CONTAINERS: dict[str, Callable[[list[Tensor]], Tensor | Iterable[Tensor]]] = {
    "list": lambda tensors: tensors,
    "tuple": tuple,
    "generator": lambda tensors: (tensor for tensor in tensors),
    "iterator": iter,
    "values of a dict": lambda tensors: dict(enumerate(tensors)).values(),
    "one tensor": lambda tensors: tensors[0] if len(tensors) == 1 else tensors,
}


@st.composite
def gradients(
    draw: st.DrawFn, dtypes: Sequence[torch.dtype] = DTYPES, largest: int = -2
) -> list[Gradient | None]:
    """Up to 6 of them, below ``2**(largest+1)``; ``None`` where a parameter has none."""
    allowed = draw(st.lists(st.sampled_from(dtypes), min_size=1, max_size=3, unique=True))
    found: list[Gradient | None] = []
    for _ in range(draw(st.integers(0, 6))):
        if draw(st.integers(0, 6)) == 0:
            found.append(None)
            continue
        dtype = draw(st.sampled_from(allowed))
        shape = draw(st.sampled_from(_SHAPES if draw(st.integers(0, 5)) else _EMPTY))
        layout = draw(st.sampled_from([name for name in LAYOUTS if dtype.is_complex or "conj" not in name]))
        values = random_tensor(shape, dtype, draw(st.integers(0, 2**31)), largest)
        found.append(Gradient(layout, *LAYOUTS[layout](values)))
    return found


def random_tensor(shape: Sequence[int], dtype: torch.dtype, seed: int, largest: int = -2) -> Tensor:
    """Numbers of both signs with exponents of five binades, the last one ``largest``."""
    generator = torch.Generator().manual_seed(seed)
    count = math.prod(shape) * (2 if dtype.is_complex else 1)
    numbers = torch.rand(count, generator=generator, dtype=torch.float64) + 1
    numbers = torch.ldexp(numbers, torch.randint(largest - 4, largest + 1, (count,), generator=generator))
    numbers *= torch.randint(0, 2, (count,), generator=generator) * 2 - 1
    if dtype.is_complex:
        numbers = torch.view_as_complex(numbers.view(-1, 2))
    return numbers.to(dtype).reshape(tuple(shape))


def bits(tensors: Iterable[Tensor | None]) -> list[Any]:
    """The bytes of all elements."""
    return [None if tensor is None else array_of(tensor).tobytes() for tensor in tensors]
