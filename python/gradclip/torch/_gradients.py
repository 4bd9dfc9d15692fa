"""From what PyTorch's functions take to gradients that an engine reads."""

from __future__ import annotations

import functools
import math
import re
import types
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple, ParamSpec, SupportsFloat, TypeAlias, TypeVar

import torch
from torch import Tensor

from gradclip import _core, _dispatch
from gradclip._dispatch import ReadGradients, read, why_no_gpu
from gradclip._result import warn_of_nothing

__all__ = [
    "CHECKING",
    "PARAMETERS",
    "READING",
    "TENSORS",
    "WRITING",
    "Conversion",
    "Names",
    "OnDevice",
    "Tensors",
    "UnsupportedGradientError",
    "as_limit",
    "as_list",
    "as_norm",
    "as_number",
    "as_threshold",
    "by_device",
    "carried",
    "carry",
    "combine",
    "gradients_of",
    "in_float_environment",
    "mark_written",
    "name_of",
    "norm_dtype",
    "norm_of",
    "read_or_convert",
    "readable",
    "refuse_graphs",
    "untraced",
    "warn_if_nothing",
    "writable",
    "written",
]

Tensors: TypeAlias = Sequence[Tensor | None]
# What entries are called in errors: a pattern for their positions, or one name each.
Names: TypeAlias = str | Sequence[str]
PARAMETERS, TENSORS = "parameters[{}].grad", "tensors[{}]"

_P = ParamSpec("_P")
_T = TypeVar("_T")

_COMPRESSED = (torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc)
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.complex128)
_CPU = torch.device("cpu")
_WIDE = (torch.float64, torch.complex128)
_LARGEST_FLOAT32 = torch.finfo(torch.float32).max


class UnsupportedGradientError(TypeError):
    """A gradient of a kind that only PyTorch itself can clip, if anybody can."""


UnsupportedGradientError.__module__ = "gradclip.torch"


def as_number(value: SupportsFloat | str, name: str) -> float:
    """``float(value)``, as PyTorch takes thresholds and orders.

    Raises:
        TypeError: It cannot be made a number.
        ValueError: It is NaN, or text that is no number.
    """
    try:
        number = float(value.detach() if isinstance(value, Tensor) else value)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{name}: expected a number, got {value!r}") from None
    if math.isnan(number):
        raise ValueError(f"{name}: expected a number, got {value!r}")
    return number


def as_threshold(value: SupportsFloat, name: str) -> float:
    """A number that is not negative; errors as of :func:`as_number`."""
    number = as_number(value, name)
    if number < 0:
        raise ValueError(f"{name}: expected a number that is not negative, got {value!r}")
    return number


def as_limit(max_norm: SupportsFloat) -> float | Tensor:
    """A threshold: on a GPU the tensor itself, so that nothing waits for it; else :func:`as_threshold`."""
    if isinstance(max_norm, Tensor) and max_norm.is_cuda:
        return max_norm.detach()
    return as_threshold(max_norm, "max_norm")


def as_norm(value: Tensor) -> Tensor:
    """A total norm as float64.

    Raises:
        TypeError: It is not a real tensor.
        ValueError: It has not one element.
    """
    _check_tensor(value, "total_norm")
    if value.is_complex():
        raise TypeError(f"total_norm: expected a real number, got dtype {str(value.dtype)[6:]}")
    if value.numel() != 1:
        raise ValueError(f"total_norm: expected a 0-d tensor, got one of shape {tuple(value.shape)}")
    return value.detach().to(torch.float64).reshape(())


def as_list(tensors: Tensor | Iterable[Tensor]) -> list[Tensor]:
    return [tensors] if isinstance(tensors, Tensor) else list(tensors)


def warn_if_nothing(grads: Tensors, parameters: object = None) -> None:
    """Warn the caller once where there is no gradient; of an empty generator in PyTorch's words."""
    if any(grad is not None for grad in grads):
        return
    if isinstance(parameters, types.GeneratorType) and not grads:
        warn_of_nothing("`parameters` is an empty generator, no gradient clipping will occur.")
    else:
        warn_of_nothing()


def carry(norm: Tensor, wide: Tensor) -> Tensor:
    """The norm as PyTorch returns it, with what it is in float64, where a float32 may not hold that."""
    if norm.dtype is not torch.float64 and (wide.is_cuda or wide.item() > _LARGEST_FLOAT32):
        norm._gradclip_wide = wide, norm._version  # type: ignore[attr-defined]
    return norm


def carried(norm: Tensor) -> Tensor | None:
    """The float64 norm that comes with a norm, unless somebody has changed that in between."""
    wide, version = getattr(norm, "_gradclip_wide", (None, None))
    return wide if version is not None and version == norm._version else None


def gradients_of(parameters: Sequence[Tensor]) -> list[Tensor | None]:
    """Their ``.grad``s, ``None`` where there is none: so the positions stay.

    Raises:
        TypeError: An entry is not a tensor.
    """
    try:
        return [parameter.grad for parameter in parameters]
    except AttributeError:
        for i, parameter in enumerate(parameters):
            _check_tensor(parameter, f"parameters[{i}]")
        raise


def name_of(names: Names, i: int) -> str:
    """What errors call entry ``i``."""
    return names.format(i) if isinstance(names, str) else names[i]


@contextmanager
def naming(names: Names) -> Iterator[None]:
    """An engine's error with the name that the caller knows: ``parameters[3].grad`` for ``grads[3]``."""
    try:
        yield
    except (TypeError, ValueError) as error:
        message = re.sub(r"\bgrads\[(\d+)\]", lambda match: name_of(names, int(match[1])), str(error))
        if message == str(error):
            raise
        raise type(error)(message) from None


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
    _check_tensor(grad, name)

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


def _check_tensor(value: object, name: str) -> None:
    if not isinstance(value, Tensor):
        got = f"{type(value).__module__}.{type(value).__qualname__}"
        raise TypeError(f"{name}: expected a torch.Tensor, got {got}")


# --- Several devices ----------------------------------------------------------------------------------


def by_device(grads: Tensors) -> dict[torch.device, list[Tensor | None]]:
    """The gradients of every device, in order of first appearance; each with all positions."""
    lists: dict[torch.device, list[Tensor | None]] = {}
    for i, grad in enumerate(grads):
        if grad is not None:
            lists.setdefault(grad.device, [None] * len(grads))[i] = grad
    return lists


def combine(norms: Sequence[Tensor], order: float) -> Tensor:
    """The norm of all from float64 norms of parts on one device; without a wait, or an overflow."""
    if len(norms) == 1:
        return norms[0]
    stacked = torch.stack(list(norms))
    return stacked.sum() if order == 0 else norm_of(stacked, order)


def norm_of(values: Tensor, order: float) -> Tensor:
    """The norm of float64 numbers that are not negative (or NaN), of any order but 0."""
    unit = values.amax() if order > 0 else values.amin()
    if math.isinf(order):
        return unit
    # Scaled, so that powers neither overflow nor vanish; 0 and inf are their own sums.
    unit = torch.where((unit > 0) & unit.isfinite(), unit, torch.ones_like(unit))
    scaled: Tensor = torch.linalg.vector_norm(values / unit, order)
    return unit * scaled


def norm_dtype(grads: Tensors) -> torch.dtype:
    """Of a norm: float64 if that is among the gradients' dtypes, else float32; 16 bits would round it."""
    wide = any(grad is not None and grad.dtype in _WIDE for grad in grads)
    return torch.float64 if wide else torch.float32


# --- The compiler and autograd ------------------------------------------------------------------------


def untraced(function: Callable[_P, _T]) -> Callable[_P, _T]:
    """The function, which ``torch.compile`` runs between its graphs: traced, what it sets would be lost."""

    @functools.wraps(function)
    def call(*args: _P.args, **kwargs: _P.kwargs) -> _T:
        if not torch.compiler.is_compiling():
            return function(*args, **kwargs)
        disable: Callable[[Any], Callable[_P, _T]] = torch.compiler.disable  # which imports the compiler
        return disable(function)(*args, **kwargs)

    return call


def in_float_environment(function: Callable[_P, _T]) -> Callable[_P, _T]:
    """The function, whose own arithmetic and PyTorch's are done as if nobody flushed denormals to zero."""

    @functools.wraps(function)
    def call(*args: _P.args, **kwargs: _P.kwargs) -> _T:
        if torch.compiler.is_compiling():
            return function(*args, **kwargs)
        saved = _core.enter_float_environment()
        try:
            return function(*args, **kwargs)
        finally:
            _core.leave_float_environment(saved)

    return call


def mark_written(grads: Tensors) -> None:
    """Tell autograd that the gradients were changed in place, so that whoever saved one finds out."""
    _dispatch.mark_written([grad for grad in grads if grad is not None])
