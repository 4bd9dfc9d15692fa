"""Gradients read by the engine of their device: as they are, or after a conversion."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple, TypeAlias, TypeVar

import torch
from torch import Tensor

from gradclip._dispatch import ReadGradients, read, why_no_gpu
from gradclip.torch._arguments import Names, Tensors, check_tensor, name_of, naming
from gradclip.torch._environment import mark_written

__all__ = [
    "CHECKING",
    "READING",
    "WRITING",
    "Conversion",
    "OnDevice",
    "UnsupportedGradientError",
    "by_device",
    "read_or_convert",
    "readable",
    "refuse_graphs",
    "writable",
    "written",
]

_T = TypeVar("_T")
_COMPRESSED = (torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc)
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.complex128)
_CPU = torch.device("cpu")


class UnsupportedGradientError(TypeError):
    """A gradient of a kind that only PyTorch itself can clip, if anybody can."""


class OnDevice(NamedTuple):
    """The gradients of one device, read by its engine."""

    read: ReadGradients
    device: torch.device


# What is done with gradients that have been read, for each device; and with the tensors.
Use: TypeAlias = Callable[[list[OnDevice], Tensors], _T]


class Conversion(NamedTuple):
    """What becomes of gradients that no engine reads as they are."""

    open: Callable[[Tensors, Names], AbstractContextManager[Tensors]]
    writes: bool  # whether they are to be written


def read_or_convert(
    grads: Tensors,
    names: Names,
    conversion: Conversion,
    use: Use[_T],
    keys: Sequence[str] | None = None,
) -> _T:
    """Use gradients as an engine reads them: as they are, or else after a conversion.

    Code of the user's (``reduce``, a policy) runs in ``use``, once: errors are caught around reading alone.

    Args:
        grads: Tensors of any kind.
        names: What they are called in errors.
        conversion: What is converted, for what: it says what is wrong with those that nobody reads.
        use: What is done with them. None of them is written before all can be.
        keys: What results call them; all have to lie on one device then.
    """

    def read_list(tensors: Tensors) -> ReadGradients:
        return read(tensors if keys is None else dict(zip(keys, tensors, strict=True)))

    device = next((getattr(grad, "device", _CPU) for grad in grads if grad is not None), _CPU)
    try:
        as_they_are = read_list(grads)
        as_they_are.require_writable()  # also what is only measured: what two share counts once
    except (TypeError, ValueError, RuntimeError):  # RuntimeError: no memory (functorch), no engine for a GPU
        pass
    else:
        with naming(names):
            return use([OnDevice(as_they_are, device)], grads)
    with conversion.open(grads, names) as plain, naming(names):
        lists = by_device(plain) if keys is None else {device: plain}
        found = [OnDevice(read_list(each), where) for where, each in lists.items()]
        if conversion.writes:
            for each, _ in found:
                each.require_writable()
        return use(found, plain)


# --- Conversions of what an engine does not read as it is ---------------------------------------------


def readable(grads: Tensors, names: Names) -> list[Tensor | None]:
    """The same gradients as tensors that an engine reads, every memory once; positions stay.

    Of sparse gradients the (coalesced) values; of the same tensor twice the first.

    Raises:
        UnsupportedGradientError: A tensor that no engine reads. It is named.
    """
    first: set[int] = set()  # a sparse tensor that is not coalesced has no memory to be known again by
    read: list[Tensor | None] = []
    for i, grad in enumerate(grads):
        if grad is None or id(grad) in first:
            read.append(None)
            continue
        first.add(id(grad))
        read.append(_read(grad, name_of(names, i)))
    return _once(read)


def writable(grads: Tensors, names: Names) -> list[Tensor | None]:
    """As :func:`readable`, of what may be written to.

    Raises:
        UnsupportedGradientError: As :func:`readable`; besides, a gradient that requires grad.
    """
    found = readable(grads, names)
    refuse_graphs(grads, names)
    return found


@contextmanager
def written(grads: Tensors, names: Names) -> Iterator[list[Tensor | None]]:
    """As :func:`writable`, for a block that writes to them.

    Sparse gradients become what the block makes of their coalesced copies; after an error they are as
    they were.
    """
    coalesced = {
        id(grad): (grad, grad.coalesce())
        for grad in grads
        if isinstance(grad, Tensor) and grad.layout is torch.sparse_coo and not grad.is_coalesced()
    }
    refuse_graphs(grads, names)
    plain = readable([coalesced[id(grad)][1] if id(grad) in coalesced else grad for grad in grads], names)
    # An engine tells autograd of the values that it writes to, which the sparse tensor does not see.
    versions = [
        (grad, values, values._version)
        for grad, values in zip(grads, plain, strict=True)
        if grad is not None and values is not None and grad.layout is not torch.strided
    ]
    yield plain
    with torch.no_grad():
        for grad, copy in coalesced.values():
            grad.copy_(copy)
    mark_written([grad for grad, values, version in versions if values._version != version])


# To read; to measure what is written afterwards; to write.
READING = Conversion(lambda grads, names: nullcontext(readable(grads, names)), writes=False)
CHECKING = Conversion(lambda grads, names: nullcontext(writable(grads, names)), writes=True)
WRITING = Conversion(written, writes=True)


def refuse_graphs(grads: Tensors, names: Names) -> None:
    """Raise :class:`UnsupportedGradientError` if a gradient requires grad."""
    for i, grad in enumerate(grads):
        if isinstance(grad, Tensor) and grad.requires_grad:
            raise UnsupportedGradientError(
                f"{name_of(names, i)}: expected a gradient that does not require grad, got one that does "
                "(of create_graph=True): writing into it would falsify its graph"
            )


def _read(grad: Tensor, name: str) -> Tensor:
    check_tensor(grad, name)

    def refuse(expected: str, got: str) -> UnsupportedGradientError:
        return UnsupportedGradientError(f"{name}: expected {expected}, got {got}")

    if type(grad) is not Tensor and type(grad) is not torch.nn.Parameter:
        raise refuse("a plain torch.Tensor", f"a {type(grad).__module__}.{type(grad).__qualname__}")
    if grad.device.type not in ("cpu", "cuda"):
        raise refuse("memory of a CPU or a CUDA device", f"a tensor on the device {grad.device}")
    if grad.is_cuda and (missing := why_no_gpu()):
        raise refuse(f"memory of the CPU, since gradclip has no GPU here ({missing})", f"{grad.device}")
    if grad.is_quantized:
        raise refuse("a tensor of floats", f"a quantised one ({grad.dtype})")
    if grad.dtype not in _FLOATS:
        raise refuse("a dtype of " + ", ".join(str(d)[6:] for d in _FLOATS), f"dtype {str(grad.dtype)[6:]}")
    if grad.layout is torch.sparse_coo:
        grad = grad.coalesce().values()
    elif grad.layout in _COMPRESSED:
        grad = grad.values()
    elif grad.layout is not torch.strided:
        raise refuse("a dense or sparse layout", f"{grad.layout}")
    if not _has_memory(grad):
        raise refuse("a tensor with memory of its own", "one without (nested, or functorch's)")
    return grad.detach() if grad.requires_grad else grad


def _has_memory(tensor: Tensor) -> bool:
    try:
        return not tensor.is_nested and (tensor.numel() == 0 or tensor.data_ptr() != 0)
    except RuntimeError:  # a wrapper of functorch
        return False


def _once(grads: list[Tensor | None]) -> list[Tensor | None]:
    seen: set[tuple[Any, ...]] = set()
    for i, grad in enumerate(grads):
        if grad is None or grad.numel() == 0:
            continue
        key = (grad.data_ptr(), grad.device, grad.dtype, grad.shape, grad.stride())
        if key in seen:
            grads[i] = None
        seen.add(key)
    return grads


def by_device(grads: Tensors) -> dict[torch.device, list[Tensor | None]]:
    """The gradients of every device, in order of first appearance; each with all positions."""
    lists: dict[torch.device, list[Tensor | None]] = {}
    for i, grad in enumerate(grads):
        if grad is not None:
            lists.setdefault(grad.device, [None] * len(grads))[i] = grad
    return lists
