"""Results do not depend on the floating-point environment of the caller, and that is as it was afterwards.

PyTorch's ``set_flush_denormal``, a library that was built with ``-ffast-math``, or a debugger of numerical
code that traps exceptions: all of them set bits of the thread that calls us.
"""

from __future__ import annotations

import copy
import ctypes
import math
import platform
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import utils

import gradclip
import gradclip.distributed
import gradclip.torch
from processes import output_of

if platform.machine() != "x86_64":
    pytest.skip("the control register of x86-64 is set here", allow_module_level=True)

_libm = ctypes.CDLL("libm.so.6")
_FLAGS = 0x3F  # exceptions that have happened: of no interest

# Control bits of the MXCSR register.
ENVIRONMENTS = {
    "flush to zero": 0x8000,
    "denormals are zero": 0x0040,
    "both": 0x8040,
    "round down": 0x2000,
    "round up": 0x4000,
    "round to zero": 0x6000,
    "trap invalid, division by zero and overflow": 0x0080 | 0x0200 | 0x0400,
}
_DEFAULT = 0x1F80


def _control() -> int:
    state = ctypes.create_string_buffer(32)
    _libm.fegetenv(state)
    return int.from_bytes(state.raw[28:32], "little") & ~_FLAGS


@contextmanager
def _environment(bits: int) -> Iterator[None]:
    trapped = bits & 0x1F80
    wanted = (_DEFAULT & ~trapped) | (bits & ~0x1F80)
    before = ctypes.create_string_buffer(32)
    _libm.fegetenv(before)
    state = ctypes.create_string_buffer(before.raw[:28] + wanted.to_bytes(4, "little"), 32)
    _libm.fesetenv(state)
    try:
        yield
        assert _control() == wanted, "the caller's environment is as it was"
    finally:
        _libm.fesetenv(before)


def _arrays() -> dict[str, np.ndarray[Any, Any]]:
    """Numbers that are, or give, subnormal and huge ones; and some that round."""
    random = np.random.default_rng(7)
    return {
        "huge": np.full(4, 3e307),
        "tiny": np.full(70_000, 1e-310),
        "tiny32": np.full(900, 1e-42, np.float32),
        "half": random.normal(size=501).astype(np.float16),
        "half tiny": np.full(30, 6e-8, np.float16),
        "single": random.normal(size=5003).astype(np.float32),
        "double": random.normal(size=(41, 37)).T,
        "complex": (random.normal(size=200) + 1j * random.normal(size=200)).astype(np.complex64),
    }


def _one(name: str) -> dict[str, np.ndarray[Any, Any]]:
    return {name: _arrays()[name]}


def _bits(found: Any) -> Any:
    if isinstance(found, gradclip.ClipResult):
        return [_bits(getattr(found, name)) for name in ("total_norm", "norms", "coefficient", "group_norms")]
    if isinstance(found, list):
        return [_bits(each) for each in found]
    if isinstance(found, torch.Tensor):
        return found.detach().view(torch.uint8).numpy().tobytes() if found.ndim else _bits(found[None])
    return np.asarray(found).tobytes()


def _sums(sums: Any) -> Any:
    return sums


_SETS: list[Callable[[], dict[str, np.ndarray[Any, Any]]]] = [
    _arrays,
    *(partial(_one, name) for name in _arrays()),
]


def _each(call: Callable[[dict[str, Any]], Any], real: bool = False) -> Callable[[Any], Any]:
    """A call on every one of the arrays, and on all: what it returns and what it leaves in memory."""

    def run(around: Callable[[], Any]) -> Any:
        found = []
        for make in _SETS:
            grads = make()
            if real:
                grads.pop("complex", None)
            if not grads:
                continue
            with around():
                result = call(grads)
            found.append((_bits(result), [array.tobytes() for array in grads.values()]))
        return found

    return run


def _over(
    values: Iterable[Any], call: Callable[[dict[str, Any], Any], Any], real: bool = False
) -> list[Callable[[Any], Any]]:
    """A case for each value."""

    def bound(value: Any) -> Callable[[dict[str, Any]], Any]:
        return lambda grads: call(grads, value)

    return [_each(bound(value), real) for value in values]


def _beside(grads: dict[str, Any]) -> dict[str, Any]:
    """A second array for each, of the same numbers in another order."""
    return {name: np.ascontiguousarray(array[::-1]) for name, array in grads.items()}


def _accumulated(grads: dict[str, Any], scale: float) -> Any:
    into = {name: array.astype(np.result_type(array, np.float32)) for name, array in _beside(grads).items()}
    measured = gradclip.accumulate_(into, grads, scale)
    return [measured.norms, *into.values()]


_THRESHOLDS = (1.0, 1e-309, 3e-40, 0.3)

CORE: dict[str, Any] = {
    "tensor_norms": _over((2, 1, 3, math.inf, 0.5), gradclip.tensor_norms),
    "global_norm": _over((2, 1, 3, math.inf, 0.5), gradclip.global_norm),
    "row_norms": _over((2, 1, 3, math.inf, 0.5), lambda g, ord: np.concatenate(gradclip.row_norms(g, ord))),
    "clip_by_global_norm_": [
        *_over(_THRESHOLDS, gradclip.clip_by_global_norm_),
        *_over(_THRESHOLDS, lambda g, limit: gradclip.clip_by_global_norm_(g, limit, rounding="down")),
        *_over(_THRESHOLDS, lambda g, limit: gradclip.clip_by_global_norm_(g, limit, groups="row")),
        *_over(
            _THRESHOLDS,
            lambda g, limit: gradclip.clip_by_global_norm_(g, limit, params=_beside(g), l2=1e-300),
        ),
        _each(lambda g: gradclip.clip_by_global_norm_(g, 0.7, grad_scale=3e-308, nonfinite="zero")),
        _each(lambda g: gradclip.clip_by_global_norm_(g, 0.7, ord=3, reduce=_sums, nonfinite="skip")),
    ],
    "accumulate_": _over(_THRESHOLDS, _accumulated),
    "clip_by_norm_": _over(_THRESHOLDS, gradclip.clip_by_norm_),
    "clip_by_value_": _over(_THRESHOLDS, gradclip.clip_by_value_, True),
    "measure": [
        *_over(_THRESHOLDS, lambda g, limit: gradclip.measure(g, ord=3, groups="tensor").clip_(limit)),
        _each(lambda g: gradclip.measure(g, grad_scale=3e-308).scale_(1e-309)),
        _each(lambda g: gradclip.measure(g, reduce=_sums).group_norms),
    ],
    "clip_difference_": [
        *_over(_THRESHOLDS, lambda g, limit: gradclip.clip_difference_(g, _beside(g), limit)),
        *_over(
            _THRESHOLDS, lambda g, limit: gradclip.clip_difference_(g, _beside(g), limit, rounding="down")
        ),
    ],
    "scale_": _over((*_THRESHOLDS, 1 / 3), gradclip.scale_),
    "Plan": [
        _each(lambda g: gradclip.Plan(g).global_norm()),
        _each(lambda g: gradclip.Plan(g).clip_by_norm_(1e-309)),
        _each(lambda g: gradclip.Plan(g).clip_by_value_(1e-309), True),
        _each(lambda g: gradclip.Plan(g).scale_(1 / 3)),
    ],
}
_NO_ARITHMETIC = {
    "ClipResult",
    "Measured",
    "NonFiniteGradientError",
    "RowNames",
    "__version__",
    "get_num_threads",
    "set_num_threads",
}
_NO_ARITHMETIC |= {"show_config", "NonFiniteNormError", "Stats", "UnsupportedGradientError", "stats"}


def _leaves(grads: dict[str, Any]) -> list[nn.Parameter]:
    leaves = []
    for array in grads.values():
        grad = torch.from_numpy(array)
        leaf = nn.Parameter(torch.zeros_like(grad))
        leaf.grad = grad
        leaves.append(leaf)
    return leaves


def _norm_and_clip(grads: dict[str, Any], max_norm: float) -> Any:
    leaves = _leaves(grads)
    total = gradclip.torch.get_total_norm([leaf.grad for leaf in leaves if leaf.grad is not None])
    gradclip.torch.clip_grads_with_norm_(leaves, max_norm, total)
    return total


def _rerouted(grads: dict[str, Any], max_norm: float) -> Any:
    with gradclip.torch.patched():
        return utils.clip_grad_norm_(_leaves(grads), max_norm)


def _param_groups(grads: dict[str, Any], max_norm: float) -> Any:
    leaves = _leaves(grads)
    optimizer = torch.optim.SGD([{"params": [leaf]} for leaf in leaves], lr=0.1)
    return gradclip.torch.clip_param_groups_(optimizer, [max_norm] * len(leaves))


def _named(grads: dict[str, Any]) -> list[tuple[str, nn.Parameter]]:
    return list(zip(grads, _leaves(grads), strict=True))


def _unscaled(grads: dict[str, Any], with_names: bool) -> Any:
    grads = {name: array for name, array in grads.items() if array.dtype != np.float16}
    named = _named(grads)
    if not named:
        return 0.0
    optimizer = torch.optim.SGD([leaf for _, leaf in named], lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=3.0)
    scaler.scale(torch.zeros(()))
    if with_names:
        return gradclip.torch.unscale_and_clip_(scaler, optimizer, 0.3, module=named, groups="tensor")
    return gradclip.torch.unscale_and_clip_(scaler, optimizer, 0.3)


def _deferred(grads: dict[str, Any], max_norm: float) -> Any:
    leaves = [leaf for leaf in _leaves(grads) if leaf.is_floating_point()]
    if not leaves:
        return 0.0
    optimizer = torch.optim.SGD(leaves, lr=1, fused=True)
    norm = gradclip.torch.defer_clip_(optimizer, max_norm)
    scale = getattr(optimizer, "grad_scale", None)
    return [norm, torch.ones(()) if scale is None else scale]


TORCH: dict[str, Any] = {
    "clip_grad_norm_": [
        *_over(_THRESHOLDS, lambda g, t: gradclip.torch.clip_grad_norm_(_leaves(g), t)),
        _each(lambda g: gradclip.torch.clip_grad_norm_(_leaves(g), 0.1, 3.0)),
        _each(lambda g: gradclip.torch.clip_grad_norm_(_leaves(g), 0.1, -1.0), True),
    ],
    "get_total_norm": [_each(lambda g: _norm_and_clip(g, 1e9))],
    "clip_grads_with_norm_": _over(_THRESHOLDS, _norm_and_clip),
    "clip_grad_value_": _over(_THRESHOLDS, lambda g, t: gradclip.torch.clip_grad_value_(_leaves(g), t), True),
    "clip_module_": [
        _each(lambda g: gradclip.torch.clip_module_(_named(g), 1e-309)),
        _each(lambda g: gradclip.torch.clip_module_(_named(g), 0.3, groups="tensor", grad_scale=3.0)),
    ],
    "clip_param_groups_": _over(_THRESHOLDS, _param_groups),
    "unscale_and_clip_": _over((False, True), _unscaled),
    "defer_clip_": _over((1.0, 0.3), _deferred),
    "install": _over(_THRESHOLDS, _rerouted),
    "patched": [_each(lambda g: _rerouted(g, 0.3))],
    "uninstall": [],
}


def test_every_public_function_has_a_case() -> None:
    assert {*gradclip.__all__, *gradclip.torch.__all__} == CORE.keys() | TORCH.keys() | _NO_ARITHMETIC


@contextmanager
def _nothing() -> Iterator[None]:
    yield


_CASES = [(name, i) for name, calls in {**CORE, **TORCH}.items() for i in range(len(calls))]
_EXPECTED: dict[tuple[str, int], Any] = {}


@pytest.mark.filterwarnings("ignore:.*subnormal")
@pytest.mark.parametrize("bits", ENVIRONMENTS.values(), ids=ENVIRONMENTS)
@pytest.mark.parametrize(("name", "i"), _CASES)
def test_the_same_bits_in_every_environment(name: str, i: int, bits: int) -> None:
    run = {**CORE, **TORCH}[name][i]
    if (name, i) not in _EXPECTED:
        _EXPECTED[name, i] = run(_nothing)
    assert run(lambda: _environment(bits)) == _EXPECTED[name, i]


def test_the_examples() -> None:
    """As people set it."""
    assert torch.set_flush_denormal(True)
    try:
        leaf = nn.Parameter(torch.zeros(4, dtype=torch.float64))
        leaf.grad = torch.full((4,), 5e307, dtype=torch.float64)
        total = gradclip.torch.get_total_norm([leaf.grad])
        gradclip.torch.clip_grads_with_norm_([leaf], 1.0, total)
        assert leaf.grad.tolist() == pytest.approx([0.5] * 4, rel=1e-5)
        tiny = np.full(70_000, 1e-310)
        result = gradclip.clip_by_value_([tiny], 1.0)
    finally:
        torch.set_flush_denormal(False)
    assert result.total_norm == 1e-310


def test_the_users_own_code_runs_in_the_users_environment() -> None:
    seen: list[int] = []

    def reduce(sums: Any) -> Any:
        seen.append(_control())
        return sums

    with _environment(0x8040):
        gradclip.clip_by_global_norm_([np.ones(3)], 1.0, reduce=reduce)
    assert seen == [0x8040 | _DEFAULT]
    joined = gradclip.distributed.Reduction(reduce, 2)
    with _environment(0x8040):
        gradclip.clip_by_global_norm_([np.ones(3)], 1.0, reduce=joined)
    assert seen[1] == _DEFAULT  # ours


def test_helper_threads_too() -> None:
    code = """
    import numpy as np, torch, gradclip
    gradclip.set_num_threads(4)
    arrays = [np.full(400_000, 1e-310) for _ in range(8)]
    expected = gradclip.global_norm(arrays)
    torch.set_flush_denormal(True)
    assert gradclip.global_norm(arrays).hex() == expected.hex()
    assert gradclip.clip_by_global_norm_(arrays, 1e-308).clipped
    torch.set_flush_denormal(False)
    print(arrays[7].max() > 0)
    """
    assert output_of(code) == "True"


def test_copies_are_made_of_results_in_any() -> None:
    with _environment(0x8040):
        result = copy.deepcopy(gradclip.clip_by_norm_({"w": np.full(4, 1e-310)}, 1.0))
    assert result.named_norms() == {"w": 2e-310}
