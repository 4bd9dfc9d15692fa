"""What reports from the field broke in ``gradclip.torch``: every example stays, with its right value."""

from __future__ import annotations

import copy
import importlib
import math
import multiprocessing
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import utils

import gradclip
import gradclip.distributed
import gradclip.torch
from processes import HANGS_AFTER, output_of


def _leaf(grad: Tensor | None, size: int = 2) -> nn.Parameter:
    leaf = nn.Parameter(torch.zeros_like(grad) if grad is not None else torch.zeros(size))
    leaf.grad = grad
    return leaf


# --- A clip deferred to the step of a wrapped optimizer -----------------------------------------------


def _fused() -> tuple[nn.Linear, torch.optim.SGD]:
    model = nn.Linear(4, 3)
    with torch.no_grad():
        model.weight.zero_()
        model.bias.zero_()
    return model, torch.optim.SGD(model.parameters(), lr=1.0, fused=True)


def _moved(model: nn.Module) -> float:
    return math.sqrt(sum(float((p.detach() ** 2).sum()) for p in model.parameters()))


def _backward(model: nn.Module) -> None:
    torch.autograd.backward(model(torch.full((5, 4), 10.0)).sum())


def _by_fabric(model: nn.Module, optimizer: torch.optim.Optimizer) -> Any:
    from lightning.fabric import Fabric  # noqa: PLC0415 (takes seconds)

    fabric = Fabric(accelerator="cpu", devices=1)
    fabric.launch()
    return fabric.setup(model, optimizer)[1]


def _by_accelerate(model: nn.Module, optimizer: torch.optim.Optimizer) -> Any:
    from accelerate import Accelerator  # noqa: PLC0415

    return Accelerator(cpu=True).prepare(optimizer)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("wrap", [_by_fabric, _by_accelerate])
def test_the_step_of_a_wrapped_optimizer_clips(wrap: Callable[[nn.Module, Any], Any]) -> None:
    model, optimizer = _fused()
    wrapped = wrap(model, optimizer)
    _backward(model)
    norm = gradclip.torch.defer_clip_(wrapped, 0.01)
    assert norm.item() > 20
    wrapped.step()
    assert _moved(model) == pytest.approx(0.01, rel=1e-4)
    assert getattr(optimizer, "grad_scale", None) is None


@pytest.mark.filterwarnings("ignore")
def test_the_step_of_a_trainers_optimizer_clips(tmp_path: Path) -> None:
    import lightning  # noqa: PLC0415

    model, optimizer = _fused()

    class Manual(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model, self.automatic_optimization = model, False

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return optimizer

        def training_step(self, batch: Tensor) -> None:
            wrapped: Any = self.optimizers()
            assert wrapped is not optimizer
            self.manual_backward(self.model(batch).sum())
            gradclip.torch.defer_clip_(wrapped, 0.01)
            wrapped.step()

    quiet: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = lightning.Trainer(
        max_steps=1, accelerator="cpu", enable_model_summary=False, default_root_dir=tmp_path, **quiet
    )
    batches: Any = torch.full((5, 4), 10.0)
    trainer.fit(Manual(), torch.utils.data.DataLoader(batches, batch_size=5))
    assert _moved(model) == pytest.approx(0.01, rel=1e-4)


class _Forwarding:
    """Somebody's own: reads go on to the optimizer, writes do not."""

    def __init__(self, optimizer: Any) -> None:
        self._inner = optimizer
        self.__class__ = type("Own", (type(self), type(optimizer)), {})

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


def test_other_wrappers_are_refused_by_name() -> None:
    _, optimizer = _fused()
    wrapped: Any = _Forwarding(optimizer)
    refused = r"optimizer: .*got a .*Own around one: pass the optimizer"
    with pytest.raises(TypeError, match=refused):
        gradclip.torch.defer_clip_(wrapped, 0.01)
    with pytest.raises(TypeError, match=refused):
        gradclip.torch.unscale_and_clip_(torch.amp.GradScaler("cpu"), wrapped, 0.01)
    assert not hasattr(optimizer, "grad_scale")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("stepped", ["wrapper", "optimizer"])
def test_unscaling_through_a_wrapper_happens_once(stepped: str) -> None:
    for call in (gradclip.torch.unscale_and_clip_, None):
        model, optimizer = _fused()
        wrapped = _by_accelerate(model, optimizer)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        torch.autograd.backward(scaler.scale(model(torch.full((5, 4), 10.0)).sum()))
        if call is None:
            norm = gradclip.torch.defer_clip_(wrapped, 0.01, scaler=scaler)
        else:
            norm = call(scaler, wrapped, 0.01)
        assert norm.item() == pytest.approx(math.sqrt(12 * 50.0**2 + 3 * 25.0), rel=1e-6)
        scaler.step(wrapped if stepped == "wrapper" else optimizer)
        scaler.update()
        assert _moved(model) == pytest.approx(0.01, rel=1e-4)
        assert getattr(optimizer, "grad_scale", None) is None
        assert scaler.get_scale() == 1024.0


def test_swapped_arguments_and_no_optimizers() -> None:
    _, optimizer = _fused()
    scaler: Any = torch.amp.GradScaler("cpu")
    swapped: Any = optimizer
    with pytest.raises(TypeError, match=r"^scaler: expected a torch.amp.GradScaler, got a torch.optim"):
        gradclip.torch.unscale_and_clip_(swapped, scaler, 1.0)
    for call in (
        lambda: gradclip.torch.unscale_and_clip_(scaler, scaler, 1.0),
        lambda: gradclip.torch.defer_clip_(scaler, 1.0),
        lambda: gradclip.torch.clip_param_groups_(scaler, [1.0]),
    ):
        with pytest.raises(TypeError, match=r"^optimizer: expected a torch.optim.Optimizer, got a torch.amp"):
            call()
    with pytest.raises(TypeError, match=r"^scaler: expected a torch.amp.GradScaler, got a torch.optim"):
        gradclip.torch.defer_clip_(optimizer, 1.0, scaler=swapped)


# --- Norms that no float32 holds ----------------------------------------------------------------------


@pytest.mark.parametrize("strict", [False, True])
def test_finite_gradients_of_a_norm_beyond_float32(strict: bool) -> None:
    """PyTorch's own raises, or sets all to 0."""
    for clip in (utils.clip_grad_norm_, gradclip.torch.clip_grad_norm_):
        leaves = [_leaf(torch.full((4,), 3e38)), _leaf(torch.full((12,), -3e38))]
        with gradclip.torch.patched():
            total = clip(leaves, 1.0, error_if_nonfinite=strict)
        assert total.item() == math.inf  # of dtype float32
        assert [leaf.grad.tolist() for leaf in leaves if leaf.grad is not None] == [[0.25] * 4, [-0.25] * 12]


def test_a_norm_that_was_changed_in_between_counts_as_it_is() -> None:
    leaves = [_leaf(torch.full((4,), 3e38)), _leaf(torch.full((12,), -3e38))]
    total = gradclip.torch.get_total_norm([leaf.grad for leaf in leaves if leaf.grad is not None])
    assert total.item() == math.inf
    total.copy_(torch.tensor(12.0))
    gradclip.torch.clip_grads_with_norm_(leaves, 3.0, total)
    torch.testing.assert_close(leaves[0].grad, torch.full((4,), 0.75e38))


def test_clipping_by_value_gives_pytorchs_bits() -> None:
    """The limit is rounded to nearest in each dtype: 0.1 is 0.1001 in bfloat16."""
    numbers = [0.1, -0.2, 3.0, -1e-30, 0.0, -0.0, math.inf, -math.inf, math.nan, 0.0999, 65504.0, 1e-7]
    grad = torch.full((3,), -1.0, dtype=torch.bfloat16)
    gradclip.torch.clip_grad_value_([_leaf(grad)], 0.1)
    assert grad[0].item() == -0.10009765625
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        for limit in (0.1, 0.3, 1 / 3, 1e-3, 1.0, 6e-8, 1e-40, 300.7, 65503.0, 0.0):
            ours, theirs = torch.tensor(numbers, dtype=dtype), torch.tensor(numbers, dtype=dtype)
            gradclip.torch.clip_grad_value_([_leaf(ours)], limit)
            utils.clip_grad_value_([_leaf(theirs)], limit)
            torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)
    core = torch.ones(1, dtype=torch.bfloat16)
    gradclip.clip_by_value_([core], 0.1)
    assert core.item() == 0.099609375, "the core rounds towards zero"


# --- Autograd finds out -------------------------------------------------------------------------------

WRITES: dict[str, Callable[[list[Any]], Any]] = {
    "scale_": lambda grads: gradclip.scale_(grads, 0.5),
    "clip_by_global_norm_": lambda grads: gradclip.clip_by_global_norm_(grads, 0.5),
    "clip_by_norm_": lambda grads: gradclip.clip_by_norm_(grads, 0.5),
    "clip_by_value_": lambda grads: gradclip.clip_by_value_(grads, 0.5),
    "zero": lambda grads: gradclip.clip_by_norm_([*grads, np.array([math.nan])], 0.5, nonfinite="zero"),
    "grad_scale": lambda grads: gradclip.clip_by_norm_(grads, 1e9, grad_scale=2.0),
    "measure, clip_": lambda grads: gradclip.measure(grads).clip_(0.5),
    "measure, scale_": lambda grads: gradclip.measure(grads).scale_(0.5),
    "Plan.scale_": lambda grads: gradclip.Plan(grads).scale_(0.5),
    "Plan.clip_by_value_": lambda grads: gradclip.Plan(grads).clip_by_value_(0.5),
    "Plan.clip_by_global_norm_": lambda grads: gradclip.Plan(grads).clip_by_global_norm_(0.5),
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
@pytest.mark.parametrize("mixed", [False, True])
def test_calls_of_the_core_tell_autograd(write: Callable[[list[Any]], Any], mixed: bool) -> None:
    weight = torch.ones(3, requires_grad=True)
    saved = torch.full((3,), 2.0)
    product = (weight * saved).sum()
    write([np.ones(2), saved, None] if mixed else [saved])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.backward(product)


def test_what_is_not_written_is_not_told() -> None:
    weight = torch.ones(3, requires_grad=True)
    saved = torch.full((3,), 2.0)
    product = (weight * saved).sum()
    gradclip.clip_by_global_norm_([saved], 1e9)
    gradclip.clip_by_value_([saved], 1e9)
    gradclip.scale_([saved], 1.0)
    gradclip.tensor_norms([saved])
    torch.autograd.backward(product)
    with torch.inference_mode():
        inference = torch.full((3,), 2.0)
    gradclip.scale_([inference, saved], 0.5)
    assert (inference == 1).all()


# --- Errors that lie, hide or kill --------------------------------------------------------------------


def _raise_nan(_: int) -> None:
    gradclip.clip_by_global_norm_({"w": np.array([math.nan, 1.0])}, 1.0)


def _raise_nan_torch(_: int) -> None:
    leaf = _leaf(torch.tensor([math.nan, 1.0]))
    gradclip.torch.clip_grad_norm_([leaf], 1.0, error_if_nonfinite=True)


@pytest.mark.parametrize("function", [_raise_nan, _raise_nan_torch])
def test_a_nan_in_a_pool_comes_back(function: Callable[[int], None]) -> None:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        result = pool.apply_async(function, (0,))
        with pytest.raises(gradclip.NonFiniteGradientError) as caught:
            result.get(timeout=HANGS_AFTER)
    assert caught.value.entries == [("w" if function is _raise_nan else "parameters[0].grad", 1, 0)]
    assert np.isnan(caught.value.norms[0])


def _error(kind: type[gradclip.NonFiniteGradientError]) -> gradclip.NonFiniteGradientError:
    error = kind("grads['w']: not finite", [("w", 1, 2)], np.array([math.nan]))
    error.add_note("seen at step 3") if hasattr(error, "add_note") else None
    return error


# Everything public, and what it returns: an object to be copied and pickled, or why it is not.
COPIED: dict[str, Callable[[], Any]] = {
    "ClipResult": lambda: gradclip.clip_by_norm_({"w": np.array([3.0, 4.0]), "b": None}, 1.0),
    "NonFiniteGradientError": lambda: _error(gradclip.NonFiniteGradientError),
    "NonFiniteNormError": lambda: _error(gradclip.torch.NonFiniteNormError),
    "RowNames": lambda: gradclip.RowNames(("w", "b"), (0, 2, 3)),
    "Stats": gradclip.torch.Stats,
    "UnsupportedGradientError": lambda: gradclip.torch.UnsupportedGradientError("grads[0]: no"),
}
REFUSED: dict[str, Callable[[], Any]] = {
    "Measured": lambda: gradclip.measure([np.ones(3)]),
    "Plan": lambda: gradclip.Plan([np.ones(3)]),
    "Reduction": lambda: gradclip.distributed.Reduction(lambda sums: sums, 2.0),
}


def test_everything_public_is_among_the_cases() -> None:
    modules = (gradclip, gradclip.torch, gradclip.distributed)
    public = {
        name for module in modules for name in module.__all__ if isinstance(getattr(module, name), type)
    }
    assert public == COPIED.keys() | REFUSED.keys()
    for module in modules:
        for name in module.__all__:  # functions, by name
            found = getattr(module, name)
            if callable(found):
                assert pickle.loads(pickle.dumps(found)) is found


@pytest.mark.parametrize("make", COPIED.values(), ids=COPIED)
def test_copies_and_pickles(make: Callable[[], Any]) -> None:
    found = make()
    copies = [copy.copy(found), copy.deepcopy(found)]
    copies += [pickle.loads(pickle.dumps(found, protocol)) for protocol in range(pickle.HIGHEST_PROTOCOL + 1)]
    for other in copies:
        assert type(other) is type(found)
        assert repr(other) == repr(found)
        assert str(other) == str(found)
        if isinstance(found, gradclip.NonFiniteGradientError):
            assert other.entries == found.entries
            assert np.array_equal(other.norms, found.norms, equal_nan=True)
            assert getattr(other, "__notes__", None) == getattr(found, "__notes__", None)
        if isinstance(found, gradclip.ClipResult):
            assert other.as_dict() == found.as_dict()
            assert other.missing == ("b",)


@pytest.mark.parametrize("make", REFUSED.values(), ids=REFUSED)
def test_or_refuses_with_a_sentence(make: Callable[[], Any]) -> None:
    found = make()
    for call in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match=f"^{type(found).__name__}: expected no copy and no pickle"):
            call(found)


def test_a_reduce_for_another_order_is_refused() -> None:
    grads = [np.array([3.0, 4.0])]
    for ord, other in ((2.0, math.inf), (math.inf, 2), (1, 2), (3.0, 2)):
        join = mock.Mock(side_effect=lambda sums: sums)
        reduce = gradclip.distributed.Reduction(join, float(ord))
        with pytest.raises(
            ValueError, match=rf"^reduce: expected one for the ord .* {float(other)}, got .*{ord}"
        ):
            gradclip.clip_by_global_norm_(grads, 1.0, ord=other, reduce=reduce)
        with pytest.raises(ValueError, match=r"^reduce: expected one for the ord"):
            gradclip.Plan(grads).clip_by_norm_(1.0, ord=other, reduce=reduce)
        join.assert_not_called()
        assert gradclip.clip_by_global_norm_(grads, 1e9, ord=ord, reduce=reduce).total_norm > 0
        join.assert_called_once()
    assert grads[0].tolist() == [3.0, 4.0]


# --- Groups, and gradients that are not there ---------------------------------------------------------


def test_an_empty_group_has_norm_0() -> None:
    full, bare = _leaf(torch.tensor([3.0, 4.0])), _leaf(None)
    groups: list[dict[str, Any]] = [
        {"params": [], "max_norm": 1.0},
        {"params": [full], "max_norm": 2.5},
        {"params": [bare]},
        {"params": []},
    ]
    optimizer = torch.optim.SGD(groups[1:2], lr=0.1)
    optimizer.param_groups[:] = [{**optimizer.param_groups[0], **group} for group in groups]
    del optimizer.param_groups[2]["max_norm"]
    result = gradclip.torch.clip_param_groups_(optimizer)
    assert result.named_group_norms() == {"0": 0.0, "1": 5.0, "2": 0.0, "3": 0.0}
    assert np.asarray(result.coefficient).tolist() == [1.0, 0.5, 1.0, 1.0]
    assert result.missing == ("param_groups[2].params[0]",)
    assert gradclip.torch.clip_param_groups_(optimizer, [1.0, None, None, 1.0]).clipped is False


def test_a_misspelt_option_is_no_option() -> None:
    optimizer = torch.optim.SGD([{"params": [_leaf(torch.ones(2))], "maxnorm": 1.0}], lr=0.1)
    with pytest.raises(ValueError, match=r'^optimizer: expected the option "max_norm" .*maxnorm'):
        gradclip.torch.clip_param_groups_(optimizer)


def _optimizer_without_gradients(**options: Any) -> torch.optim.SGD:
    return torch.optim.SGD([{"params": [_leaf(None)], "max_norm": 1.0}], lr=0.1, **options)


NOTHING: dict[str, Callable[[], Any]] = {
    "clip_grad_norm_": lambda: gradclip.torch.clip_grad_norm_([_leaf(None)], 1.0),
    "clip_grad_value_": lambda: gradclip.torch.clip_grad_value_([_leaf(None)], 1.0),
    "clip_grads_with_norm_": lambda: gradclip.torch.clip_grads_with_norm_([], 1.0, torch.tensor(1.0)),
    "clip_module_": lambda: gradclip.torch.clip_module_(nn.Linear(2, 2), 1.0),
    "clip_param_groups_": lambda: gradclip.torch.clip_param_groups_(_optimizer_without_gradients()),
    "defer_clip_": lambda: gradclip.torch.defer_clip_(_optimizer_without_gradients(fused=True), 1.0),
    "unscale_and_clip_": lambda: gradclip.torch.unscale_and_clip_(
        torch.amp.GradScaler("cpu", enabled=False), _optimizer_without_gradients(), 1.0
    ),
    "rerouted": lambda: utils.clip_grad_norm_([_leaf(None)], 1.0),
    "rerouted, a list": lambda: utils.clip_grad_norm_([], 1.0),
}


@pytest.mark.parametrize("call", NOTHING.values(), ids=NOTHING)
def test_nothing_to_clip_warns_once(call: Callable[[], Any]) -> None:
    with gradclip.torch.patched(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    assert [str(warning.message)[:37] for warning in caught] == ["grads: expected gradients, got none, "]
    assert caught[0].filename == __file__


# --- Names --------------------------------------------------------------------------------------------


class _OwnTensor(Tensor):
    pass


def test_errors_under_the_reroute_name_the_parameter() -> None:
    frozen = nn.Parameter(torch.zeros(2), requires_grad=False)
    fine = _leaf(torch.ones(2))
    with gradclip.torch.patched() as counts:
        nan = [frozen, _leaf(None), fine, _leaf(torch.tensor([math.nan, 1.0]))]
        with pytest.raises(
            gradclip.torch.NonFiniteNormError, match=r"parameters\[3\]\.grad: .*1 NaN"
        ) as caught:
            utils.clip_grad_norm_(nan, 1.0, error_if_nonfinite=True)
        assert caught.value.entries == [("parameters[3].grad", 1, 0)]
        one = torch.ones(4)
        overlapping = [frozen, _leaf(one[:3]), _leaf(one[1:])]
        with pytest.raises(ValueError, match=r"^parameters\[2\]\.grad: .*parameters\[1\]\.grad"):
            utils.clip_grad_norm_(overlapping, 1e-3)
        utils.clip_grad_norm_([frozen, fine, _leaf(torch.ones(2).as_subclass(_OwnTensor))], 1.0)
        assert all(reason.startswith("parameters[2].grad: expected a plain") for reason in counts.reasons)
        assert counts.passed_on["get_total_norm"] == 1


def test_a_reload_keeps_pytorchs_own() -> None:
    install = importlib.import_module("gradclip.torch._install")
    originals = {name: install._cell_of(name).cell_contents for name in install._OURS}
    gradclip.torch.install()
    try:
        importlib.reload(install)
        install.install()
        leaf = _leaf(torch.tensor([3e20, 4e20]))
        assert utils.clip_grad_norm_([leaf], 1.0).item() == pytest.approx(5e20)
    finally:
        install.uninstall()
    assert {name: install._cell_of(name).cell_contents for name in install._OURS} == originals
    with install.patched():
        importlib.reload(install)
    assert {name: install._cell_of(name).cell_contents for name in install._OURS} == originals
    importlib.reload(gradclip.torch)


def test_without_torch_it_says_what_to_install() -> None:
    code = """
    import sys
    sys.modules["torch"] = None
    sys.modules["mpi4py"] = None
    from gradclip import distributed
    for what in ("import gradclip.torch", "distributed.process_group()", "distributed.mpi(0)"):
        try:
            exec(what)
        except ModuleNotFoundError as error:
            print(error)
    """
    torch_line = "gradclip.torch: expected PyTorch to be installed: pip install 'gradclip[torch]'"
    mpi_line = "gradclip.distributed.mpi: expected mpi4py to be installed: pip install mpi4py"
    assert output_of(code).splitlines() == [torch_line, torch_line, mpi_line]


# --- Mixed precision with names -----------------------------------------------------------------------


@pytest.mark.parametrize("groups", [None, "tensor", "module", 1])
@pytest.mark.parametrize("bad", [False, True])
def test_unscaling_with_the_names_of_a_module(groups: Any, bad: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    twin = copy.deepcopy(model)
    results = []
    each: Any
    for each in (model, twin):
        optimizer = torch.optim.SGD(each.parameters(), lr=1.0)
        scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
        torch.autograd.backward(scaler.scale(each(torch.ones(5, 4)).square().sum() * 10))
        if bad:
            each[0].weight.grad[0, 0] = math.inf
        if each is model:
            results.append(
                gradclip.torch.unscale_and_clip_(scaler, optimizer, 0.5, module=each, groups=groups)
            )
        else:
            scaler.unscale_(optimizer)
            results.append(gradclip.torch.clip_module_(each, 0.5, groups=groups, nonfinite="skip"))
        scaler.step(optimizer)
        scaler.update()
        assert scaler.get_scale() == (128.0 if bad else 256.0)
    ours, theirs = results
    assert ours.names == theirs.names == ("0.weight", "0.bias", "1.weight", "1.bias")
    assert ours.named_norms() == theirs.named_norms()
    assert ours.nonfinite == (("0.weight",) if bad else ())
    for mine, other in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=2e-6, atol=1e-7)
    missing = nn.Sequential(model[0])
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    with pytest.raises(
        ValueError, match="module: expected names for all 4 parameters of the optimizer, got 2"
    ):
        gradclip.torch.unscale_and_clip_(torch.amp.GradScaler("cpu"), optimizer, 1.0, module=missing)


def test_dtensors_are_clipped_by_name() -> None:
    code = """
    import warnings
    warnings.simplefilter("ignore")
    import torch, torch.distributed as dist
    from torch.distributed.tensor import DTensor, distribute_tensor
    import gradclip.torch
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    mesh = dist.init_device_mesh("cpu", (1,))
    model = torch.nn.Linear(2, 2)
    for name, parameter in list(model.named_parameters()):
        spread = torch.nn.Parameter(distribute_tensor(parameter.detach(), mesh))
        setattr(model, name, spread)
        spread.grad = distribute_tensor(torch.ones_like(parameter), mesh)
    optimizer, scaler = torch.optim.SGD(model.parameters(), lr=0.1), torch.amp.GradScaler("cpu")
    scaler.scale(torch.ones(()))
    for call in (
        lambda: gradclip.torch.clip_module_(model, 1.0),
        lambda: gradclip.torch.clip_param_groups_(optimizer, [1.0]),
        lambda: gradclip.torch.unscale_and_clip_(scaler, optimizer, 1.0, module=model),
    ):
        print(call().named_norms())
    dist.destroy_process_group()
    """
    lines = output_of(code).splitlines()
    assert lines[0] == "{'weight': 2.0, 'bias': 1.4142135623730951}"
    assert [line.count(": ") for line in lines] == [2, 2, 2]
