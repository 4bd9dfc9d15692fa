"""Short trainings under real frameworks, by PyTorch's clipping and by gradclip's: the same losses."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
import torch._inductor.config
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.data import DataLoader, TensorDataset
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import gradclip.torch

pytestmark = [
    # Lightning 2.6 asks PyTorch's trees in a way that 2.13 would like to be asked in another.
    pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec.. is deprecated"),
    pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers"),
]
MAX_NORM = 0.5
_BATCHES = 8


@pytest.fixture(autouse=True)
def _quiet_and_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """One thread, since two in a small model mostly wait; files and the frameworks' state thrown away."""
    assert os.environ["HF_HUB_OFFLINE"] == "1"  # by conftest.py, before it was read
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch._inductor.config.patch(compile_threads=1):  # no pool of processes
        yield
    torch.set_num_threads(threads)
    torch._dynamo.reset()
    for state in (AcceleratorState, PartialState, GradientState):
        state._shared_state.clear()


def _model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 1))


def _batches() -> DataLoader[Any]:
    """Targets far away, so that gradients are large and every step clips."""
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(64, 8, generator=generator), torch.randn(64, 1, generator=generator)
    return DataLoader(TensorDataset(x, 20 * y), batch_size=64 // _BATCHES)


def _loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return nn.functional.mse_loss(model(x).float(), y.float())


@dataclass
class Run:
    """What a training told."""

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    steps: int = 0


@contextmanager
def _steps_counted(run: Run) -> Iterator[None]:
    """Of every optimizer, by PyTorch itself: not by the framework or by what is tested."""

    def count(*_: object) -> None:
        run.steps += 1

    handle = register_optimizer_step_post_hook(count)
    try:
        yield
    finally:
        handle.remove()


class Regression(lightning.LightningModule):
    def __init__(self, run: Run) -> None:
        super().__init__()
        self.net, self.run = _model(), run

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        loss = _loss(self.net, *batch)
        self.run.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def _lightning_trainer(run: Run, max_norm: float | None, **options: Any) -> None:
    trainer = lightning.Trainer(
        gradient_clip_val=max_norm,
        accelerator="cpu",
        devices=1,
        max_epochs=2,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=Path.cwd(),
        **options,
    )
    trainer.fit(Regression(run), _batches())


def _lightning_trainer_bf16(run: Run, max_norm: float | None) -> None:
    _lightning_trainer(run, max_norm, precision="bf16-true")


def _lightning_fabric(run: Run, max_norm: float | None) -> None:
    fabric = lightning.Fabric(accelerator="cpu", devices=1)
    net = _model()
    model, optimizer = fabric.setup(net, torch.optim.SGD(net.parameters(), lr=0.1))
    for x, y in fabric.setup_dataloaders(_batches()):
        optimizer.zero_grad()
        loss = _loss(model, x, y)
        run.losses.append(loss.item())
        fabric.backward(loss)
        if max_norm is not None:
            norm = fabric.clip_gradients(model, optimizer, max_norm=max_norm)
            assert isinstance(norm, Tensor)
            run.norms.append(norm.item())
        optimizer.step()


def _accelerate(run: Run, max_norm: float | None) -> None:
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    net = _model()
    model, optimizer, batches = accelerator.prepare(
        net, torch.optim.SGD(net.parameters(), lr=0.1), _batches()
    )
    for x, y in batches:
        with accelerator.accumulate(model):
            loss = _loss(model, x, y)
            run.losses.append(loss.item())
            accelerator.backward(loss)
            if accelerator.sync_gradients and max_norm is not None:
                run.norms.append(accelerator.clip_grad_norm_(model.parameters(), max_norm).item())
            optimizer.step()
            optimizer.zero_grad()


def _transformers(run: Run, max_norm: float | None) -> None:
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2
        )
    )
    tokens = torch.randint(32, (32, 8), generator=torch.Generator().manual_seed(2))
    arguments = TrainingArguments(
        "out",
        max_steps=6,
        max_grad_norm=0.0 if max_norm is None else max_norm,
        gradient_accumulation_steps=2,
        per_device_train_batch_size=2,
        learning_rate=0.3,
        optim="sgd",
        lr_scheduler_type="constant",
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        save_strategy="no",
        logging_steps=1,
    )
    trainer = Trainer(model, arguments, train_dataset=[{"input_ids": ids, "labels": ids} for ids in tokens])
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    run.losses += [entry["loss"] for entry in logged]
    run.norms += [entry["grad_norm"] for entry in logged]


FRAMEWORKS: dict[str, Callable[[Run, float | None], None]] = {
    "Lightning Trainer": _lightning_trainer,
    "Lightning Trainer, bfloat16": _lightning_trainer_bf16,
    "Lightning Fabric": _lightning_fabric,
    "Accelerate": _accelerate,
    "transformers Trainer": _transformers,
}


def _run(
    train: Callable[[Run, float | None], None], max_norm: float | None, ours: AbstractContextManager[Any]
) -> Run:
    run = Run()
    with ours, _steps_counted(run):
        train(run, max_norm)
    assert len(run.losses) >= 6
    return run


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_the_same_training(framework: str) -> None:
    train = FRAMEWORKS[framework]
    theirs = _run(train, MAX_NORM, nullcontext())
    counts = gradclip.torch.patched()
    ours = _run(train, MAX_NORM, counts)
    taken = gradclip.torch.stats()
    assert ours.steps == theirs.steps > 0
    assert dict(taken.taken) == {"get_total_norm": ours.steps, "clip_grads_with_norm_": ours.steps}
    assert not taken.passed_on, taken.reasons
    # Rounding of 8 bits, where PyTorch rounds norm and coefficient to them too; else of 24.
    rel = 2e-2 if "bfloat16" in framework else 1e-5
    assert ours.losses == pytest.approx(theirs.losses, rel=rel)
    assert ours.norms == pytest.approx(theirs.norms, rel=rel)
    assert all(norm > MAX_NORM for norm in ours.norms)  # every step clipped
    # Without a clip it is another training: agreement means something.
    unclipped = _run(train, None, nullcontext())
    assert max(abs(a / b - 1) for a, b in zip(unclipped.losses, theirs.losses, strict=True)) > 5 * rel
    assert unclipped.steps == theirs.steps


def test_clipping_by_value() -> None:
    def train(run: Run, limit: float | None) -> None:
        _lightning_trainer(run, limit, gradient_clip_algorithm="value")

    theirs = _run(train, 0.05, nullcontext())
    ours = _run(train, 0.05, gradclip.torch.patched())
    assert dict(gradclip.torch.stats().taken) == {"clip_grad_value_": ours.steps}
    assert not gradclip.torch.stats().passed_on
    assert ours.losses == pytest.approx(theirs.losses, rel=1e-6)


# --- torch.compile ------------------------------------------------------------------------------------


def _gradients(module: Any, backend: str | None, *, whole: bool) -> tuple[list[float], list[Tensor]]:
    """Three steps of a training, compiled in one graph: from the loss on, or what follows the backward."""
    net = _model()
    ((x, y), *_) = _batches()

    def finish() -> Tensor:
        norm: Tensor = module.clip_grad_norm_(net.parameters(), MAX_NORM)
        with torch.no_grad():
            for p in net.parameters():
                assert p.grad is not None
                p.sub_(p.grad, alpha=0.1)
        return norm

    def backward() -> None:
        torch.autograd.backward(_loss(net, x, y))

    def step() -> Tensor:
        _loss(net, x, y).backward()  # type: ignore[no-untyped-call]
        norm = finish()
        for p in net.parameters():
            p.grad = None
        return norm

    def compiled(function: Callable[[], Tensor]) -> Callable[[], Tensor]:
        return torch.compile(function, fullgraph=True, backend=backend) if backend else function

    norms = []
    with torch._dynamo.config.patch(trace_autograd_ops=True):
        call = compiled(step if whole else finish)
        for _ in range(3):
            if not whole:
                net.zero_grad()
                backward()
            norms.append(call().item())
    return norms, [p.detach() for p in net.parameters()]


@pytest.mark.parametrize(
    ("backend", "whole"), [("aot_eager", True), ("aot_eager", False), ("inductor", False)]
)
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated")
def test_a_compiled_step_is_the_eager_one(backend: str, whole: bool) -> None:
    norms, parameters = _gradients(gradclip.torch, backend, whole=whole)
    expected_norms, expected = _gradients(gradclip.torch, None, whole=whole)
    assert norms == pytest.approx(expected_norms, rel=1e-6)
    for a, b in zip(parameters, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def test_a_compiled_step_keeps_pytorchs_functions_under_the_reroute() -> None:
    expected, _ = _gradients(torch.nn.utils, None, whole=False)
    with gradclip.torch.patched() as counts:
        norms, _ = _gradients(torch.nn.utils, "aot_eager", whole=False)
    assert norms == pytest.approx(expected, rel=1e-6)
    assert not counts.taken


def test_nothing_to_clip_compiles() -> None:
    net = _model()
    clip = torch.compile(
        lambda: gradclip.torch.clip_grad_norm_(net.parameters(), 1.0), fullgraph=True, backend="aot_eager"
    )
    assert clip().item() == 0
    parameter = next(net.parameters())
    parameter.grad = torch.full_like(parameter, 2.0)
    assert clip().item() == pytest.approx(2 * parameter.numel() ** 0.5)  # the others have none


@pytest.mark.parametrize("norm_type", [2.0, float("inf"), -1.0])
@pytest.mark.parametrize("max_norm", [0.5, 100.0])
def test_the_operator_keeps_pytorchs_rules(norm_type: float, max_norm: float) -> None:
    grads = [torch.ones(4), torch.ones(2, 3, dtype=torch.float64), torch.ones(1, dtype=torch.bfloat16)]
    operator = torch.ops.gradclip.clip_grad_norm_.default
    for threshold in ((max_norm, None), (0.0, torch.tensor(max_norm))):
        results = torch.library.opcheck(operator, (grads, [0, 1, 3], *threshold, norm_type, False))
        assert set(results.values()) == {"SUCCESS"}


def test_the_other_operators_keep_pytorchs_rules() -> None:
    grads, places = [torch.full((4,), 2.0), torch.ones(2, 3, dtype=torch.float64)], [1, 2]
    operators = torch.ops.gradclip
    for operator, arguments in (
        (operators.get_total_norm, (grads, places, 2.0, False)),
        (operators.clip_grads_with_norm_, (grads, places, 0.5, None, torch.tensor(5.0))),
        (operators.clip_grads_with_norm_, (grads, places, 0.0, torch.tensor(0.5), torch.tensor(5.0))),
        (operators.clip_grad_value_, (grads, places, 0.5)),
    ):
        results = torch.library.opcheck(operator.default, arguments)
        assert set(results.values()) == {"SUCCESS"}


def _leaves() -> list[Tensor]:
    dtypes = (torch.float32, torch.bfloat16, torch.float64, torch.float32)
    leaves: list[Tensor] = [torch.nn.Parameter(torch.zeros(5, dtype=dtype)) for dtype in dtypes]
    for i, leaf in enumerate(leaves[1:]):
        leaf.grad = torch.randn(5, generator=torch.Generator().manual_seed(i)).to(leaf.dtype)
    return leaves


@pytest.mark.parametrize(
    "call",
    [
        lambda leaves: gradclip.torch.clip_grad_norm_(leaves, torch.tensor(0.5)),
        lambda leaves: gradclip.torch.get_total_norm([leaf.grad for leaf in leaves[1:]], math.inf),
        lambda leaves: gradclip.torch.get_total_norm([leaf * 2 for leaf in leaves]),
        lambda leaves: gradclip.torch.clip_grads_with_norm_(leaves, 0.5, torch.tensor(5.0)),
        lambda leaves: gradclip.torch.clip_grads_with_norm_(leaves, torch.tensor(0.5), torch.tensor(5.0)),
        lambda leaves: gradclip.torch.clip_grad_value_((leaf for leaf in leaves), 0.5),
    ],
)
def test_each_drop_in_compiles_to_what_it_does(call: Callable[[list[Tensor]], Tensor | None]) -> None:
    expected, leaves = _leaves(), _leaves()
    total = call(expected)
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")(leaves)
    assert total is None or (compiled is not None and torch.equal(compiled, total))
    assert compiled is None or not compiled.requires_grad
    for leaf, other in zip(leaves[1:], expected[1:], strict=True):
        assert leaf.grad is not None
        assert other.grad is not None
        assert torch.equal(leaf.grad, other.grad)
        assert (leaf.grad._version > 0) == (other.grad._version > 0)


def test_a_compiled_call_names_the_parameter() -> None:
    leaves = _leaves()
    assert leaves[2].grad is not None
    leaves[2].grad[0] = math.nan
    clip = torch.compile(
        lambda: gradclip.torch.clip_grad_norm_(leaves, 0.5, error_if_nonfinite=True), backend="aot_eager"
    )
    with pytest.raises(RuntimeError, match=r"parameters\[2\]\.grad: expected finite elements, got 1 NaN"):
        clip()


def _by_module(optimizer: torch.optim.Optimizer) -> Tensor:
    named = [("weight", optimizer.param_groups[0]["params"][0])]
    return torch.tensor(gradclip.torch.clip_module_(named, 0.5).total_norm)


def _unscaled(optimizer: torch.optim.Optimizer) -> Tensor:
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    scaler.scale(torch.ones(()))
    return gradclip.torch.unscale_and_clip_(scaler, optimizer, 0.5)


@pytest.mark.parametrize(
    "clip", [_by_module, _unscaled, lambda optimizer: gradclip.torch.defer_clip_(optimizer, 0.5)]
)
def test_other_calls_break_the_graph_and_no_more(clip: Callable[[torch.optim.Optimizer], Tensor]) -> None:
    found = []
    for call in (clip, torch.compile(clip, backend="aot_eager")):
        weight = torch.nn.Parameter(torch.zeros(2))
        weight.grad = torch.tensor([3.0, 4.0])
        optimizer = torch.optim.SGD([weight], lr=1.0, fused=True)
        norm = call(optimizer)
        version = weight.grad._version
        optimizer.step()
        found.append((norm.item(), version, weight.tolist()))
    assert found[0] == found[1]


# --- docs/frameworks.md -------------------------------------------------------------------------------

_PAGE = Path(__file__).parent.parent / "docs" / "frameworks.md"
# How many clips by norm the code under a heading makes.
_CLIPS = {
    "A plain loop": 4,
    "Lightning: Trainer": 4,
    "Lightning: Fabric": 4,
    "Accelerate": 4,
    "transformers: Trainer": 4,
    "torch.compile": 0,
    "Who clipped?": 0,
}


def test_the_page_runs(capsys: pytest.CaptureFixture[str]) -> None:
    first, *sections = re.split(r"^## ", _PAGE.read_text(), flags=re.MULTILINE)
    assert [section.splitlines()[0] for section in sections] == list(_CLIPS)
    namespace: dict[str, Any] = {"__name__": "page"}
    try:
        for section in (first, *sections):
            before = gradclip.torch.stats().taken.copy() if section is not first else None
            blocks = re.findall(r"^```python\n(.*?)^```", section, flags=re.MULTILINE | re.DOTALL)
            assert len(blocks) == 1
            exec(compile(blocks[0], str(_PAGE), "exec"), namespace)
            if before is not None:
                clips = _CLIPS[section.splitlines()[0]]
                new = gradclip.torch.stats().taken - before
                assert dict(new) == (
                    {"get_total_norm": clips, "clip_grads_with_norm_": clips} if clips else {}
                )
        assert not gradclip.torch.stats().passed_on
        assert "'get_total_norm': 20" in capsys.readouterr().out
    finally:
        gradclip.torch.uninstall()
