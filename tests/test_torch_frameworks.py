"""Short trainings under real frameworks, by PyTorch's clipping and by gradclip's: the same losses."""

from __future__ import annotations

import os
import re
import subprocess
import sys
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

import gradclip.keras
import gradclip.torch
from processes import HANGS_AFTER

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


# --- docs/frameworks.md -------------------------------------------------------------------------------

_PAGE = Path(__file__).parent.parent / "docs" / "frameworks.md"
# How many clips by norm the code under a heading makes.
_CLIPS: dict[str, int | None] = {  # None: its code runs on two ranks
    "A plain loop": 4,
    "Lightning: Trainer": 4,
    "Lightning: Fabric": 4,
    "Accelerate": 4,
    "transformers: Trainer": 4,
    "Keras": 0,  # it has counts of its own
    "torch.compile": 0,
    "Who clipped?": 0,
    "Flower": 0,
    "Offloaded training": 0,
    "Many ranks": None,
}


def test_the_page_runs(capsys: pytest.CaptureFixture[str]) -> None:
    first, *sections, ratios = re.split(r"^## ", _PAGE.read_text(), flags=re.MULTILINE)
    assert ratios.startswith("What it saves\n")
    assert [section.splitlines()[0] for section in sections] == list(_CLIPS)
    namespace: dict[str, Any] = {"__name__": "page"}
    try:
        for section in (first, *sections):
            before = gradclip.torch.stats().taken.copy() if section is not first else None
            blocks = re.findall(r"^```python\n(.*?)^```", section, flags=re.MULTILINE | re.DOTALL)
            assert len(blocks) == 1
            if _CLIPS.get(section.splitlines()[0], 0) is None:
                continue
            exec(compile(blocks[0], str(_PAGE), "exec"), namespace)
            if before is not None:
                clips = _CLIPS[section.splitlines()[0]]
                new = gradclip.torch.stats().taken - before
                assert dict(new) == (
                    {"get_total_norm": clips, "clip_grads_with_norm_": clips} if clips else {}
                )
        assert not gradclip.torch.stats().passed_on
        assert dict(gradclip.keras.stats().taken) == {"global_clipnorm": 4}
        assert not gradclip.keras.stats().passed_on
        assert "'get_total_norm': 20" in capsys.readouterr().out
    finally:
        gradclip.torch.uninstall()
        gradclip.keras.uninstall()


def test_the_code_of_many_ranks_runs_on_two(tmp_path: Path) -> None:
    section = _PAGE.read_text().split("## Many ranks\n")[1]
    script = tmp_path / "many_ranks.py"
    script.write_text(section.split("```python\n")[1].split("```")[0])
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        str(script),
    ]
    environment = os.environ | {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command,
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=HANGS_AFTER,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    norms = f"{{'weight': {4 * 8**0.5}, 'bias': 4.0}}"
    # Both write to one pipe, and an end of line is written by itself: the lines may run into each other.
    assert done.stdout.count(norms) == 2
    assert done.stdout.replace(norms, "").split() == []
