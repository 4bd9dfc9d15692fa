"""The callbacks in real trainings of Lightning and the transformers Trainer; fused optimizers that skip."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import pytest
import torch
import transformers
from torch import Tensor, nn

import gradclip
import gradclip.torch
from gradclip.monitor import GradientMonitor
from gradclip.monitor.lightning import GradientMonitorCallback as LightningCallback
from gradclip.monitor.transformers import GradientMonitorCallback as TrainerCallback
from gradclip.policies import Percentile, SkipStep

_QUIET: dict[str, Any] = {
    "logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu",
}  # fmt: skip


class _Module(lightning.LightningModule):
    """A regression; in one step its loss is a million times too large."""

    def __init__(self, spike_at: int = -1) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
        self.spike_at = spike_at
        self.norms: list[float] = []

    def training_step(self, batch: Any, index: int) -> Tensor:
        loss = (self.layers(batch[0]) - batch[1]).square().mean()
        return loss * (1e6 if index == self.spike_at else 1)  # type: ignore[no-any-return]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        self.norms.append(gradclip.global_norm([p.grad for p in self.parameters()]))


def _batches(count: int) -> Any:
    generator = torch.Generator().manual_seed(1)
    data = torch.randn(8 * count, 5, generator=generator)
    pairs = torch.utils.data.TensorDataset(data[:, :4], data[:, 4:])
    return torch.utils.data.DataLoader(pairs, batch_size=8)


@pytest.mark.filterwarnings("ignore")
def test_lightning_measures_and_warns(tmp_path: Path) -> None:
    callback = LightningCallback(GradientMonitor(save_to=tmp_path / "alerts", clips=False))
    module = _Module(spike_at=15)
    trainer = lightning.Trainer(max_steps=20, callbacks=[callback], default_root_dir=str(tmp_path), **_QUIET)
    trainer.fit(module, _batches(20))
    monitor = callback.monitor
    assert monitor.step == 20
    assert monitor.names == tuple(name for name, _ in module.named_parameters())
    assert monitor.total_norms.tolist() == module.norms
    assert np.isfinite(monitor.losses).all()
    first = monitor.alerts[0]
    assert (first.kind, first.step) == ("exploded", 16)
    assert any((tmp_path / "alerts").glob("*.batch.pkl"))


@pytest.mark.filterwarnings("ignore")
def test_lightning_clips_by_a_policy_and_resumes_with_equal_bits(tmp_path: Path) -> None:
    """Stopped after an epoch and resumed from Lightning's checkpoint, policy and all."""

    def run(epochs: int, resume: Path | None = None) -> tuple[_Module, LightningCallback]:
        module, callback = _Module(), LightningCallback(max_norm=Percentile(30, 6))
        trainer = lightning.Trainer(
            max_epochs=epochs, callbacks=[callback], default_root_dir=str(tmp_path), **_QUIET
        )
        trainer.fit(module, _batches(10), ckpt_path=resume, weights_only=False)
        trainer.save_checkpoint(tmp_path / f"{epochs}.ckpt")
        return module, callback

    whole, callback = run(2)
    assert (callback.monitor.coefficients < 1).sum() > 5
    assert callback.result is not None
    run(1)
    resumed, again = run(2, tmp_path / "1.ckpt")
    assert again.monitor.step == 10
    assert again.monitor.coefficients.tolist() == callback.monitor.coefficients[10:].tolist()
    for a, b in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.filterwarnings("ignore")
def test_the_transformers_trainer(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = transformers.GPT2Config(n_layer=2, n_head=2, n_embd=16, vocab_size=32, n_positions=16)
    model = transformers.GPT2LMHeadModel(config)
    tokens = torch.randint(0, 32, (64, 16), generator=torch.Generator().manual_seed(1))
    callback = TrainerCallback(GradientMonitor(), max_norm=0.5)
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), max_steps=8, per_device_train_batch_size=8, max_grad_norm=0.0,
        logging_steps=1, report_to=[], use_cpu=True, save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    rows = [{"input_ids": row, "labels": row} for row in tokens]
    transformers.Trainer(model, arguments, train_dataset=rows, callbacks=[callback]).train()
    monitor = callback.monitor
    assert monitor.step == 8
    assert (monitor.total_norms > 0.5).all()
    assert monitor.clipped_norms == pytest.approx(np.full(8, 0.5), rel=1e-6)
    assert np.isfinite(monitor.losses[1:]).all()  # of the step before
    assert monitor.names is not None
    assert "transformer.h.0.attn.c_attn.weight" in monitor.names


def test_without_a_monitor_of_their_own_they_warn() -> None:
    callback = LightningCallback()
    module = nn.Linear(1, 1)
    for value in [1.0] * 8 + [1e7]:
        for parameter in module.parameters():
            parameter.grad = torch.full_like(parameter, value)
        callback.on_before_optimizer_step(None, module, None)  # type: ignore[arg-type]
        if value > 1:
            with pytest.warns(UserWarning, match="times its usual norm"):
                callback.on_train_batch_end(None, module, None, None, 0)  # type: ignore[arg-type]
        else:
            callback.on_train_batch_end(None, module, None, None, 0)  # type: ignore[arg-type]
    assert callback.state_dict() == {}


@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW"])
def test_a_fused_optimizer_skips_what_a_policy_skips(name: str) -> None:
    """`found_inf`, as a GradScaler sets it: the step is left out where it runs, and nobody waits."""
    torch.manual_seed(0)
    model = nn.Linear(4, 1)
    optimizer: Any = getattr(torch.optim, name)(model.parameters(), lr=0.1, fused=True)
    policy = SkipStep(window=8)
    for step in range(8):
        optimizer.zero_grad()
        (model(torch.randn(8, 4)).square().mean() * (1e6 if step == 7 else 1)).backward()
        result = gradclip.torch.clip_module_(model, policy)
        before = [parameter.detach().clone() for parameter in model.parameters()]
        optimizer.found_inf = torch.tensor(float(result.skipped))
        optimizer.step()
        moved = any(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
        assert moved is not bool(result.skipped)
        assert bool(result.skipped) is (step == 7)
    assert math.isfinite(model.weight.sum().item())
