"""Flower's mods and a strategy, whole, on updates of the sizes that are sent: time and memory."""

from __future__ import annotations

import logging
import tracemalloc
from collections.abc import Callable, Iterator
from functools import partial
from importlib.metadata import version
from types import SimpleNamespace
from typing import Any, TypeAlias

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import mod as their_mods
from flwr.serverapp import strategy as their_strategies
from flwr.supercore.task_identity import TaskIdentity

import gradclip.flower as ours
from bench.architectures import MODELS, Shapes
from tools.integrations.timing import Comparison, compare

__all__ = ["measure"]

Job: TypeAlias = Callable[[], Any]
CNN: Shapes = {  # LeNet-5 on 32 x 32 x 3, as Flower's quickstart trains it
    "conv1.weight": (6, 3, 5, 5), "conv1.bias": (6,), "conv2.weight": (16, 6, 5, 5), "conv2.bias": (16,),
    "fc1.weight": (120, 400), "fc1.bias": (120,), "fc2.weight": (84, 120), "fc2.bias": (84,),
    "fc3.weight": (10, 84), "fc3.bias": (10,),
}  # fmt: skip
# Rank 8 on queries and values of Llama-3.2-1B.
LORA: Shapes = {
    f"layers.{i}.{part}.lora_{side}": shape
    for i in range(16)
    for part, outputs in (("q_proj", 2048), ("v_proj", 512))
    for side, shape in (("A", (8, 2048)), ("B", (outputs, 8)))
}


def _resnet18() -> Shapes:
    """He et al. 2015, arXiv:1512.03385, table 1; as torchvision's resnet18, with the running statistics."""
    shapes: Shapes = {}

    def convolution(name: str, norm: str, outputs: int, inputs: int, size: int) -> None:
        shapes[f"{name}.weight"] = (outputs, inputs, size, size)
        for part in ("weight", "bias", "running_mean", "running_var"):
            shapes[f"{norm}.{part}"] = (outputs,)

    convolution("conv1", "bn1", 64, 3, 7)
    inputs = 64
    for stage, width in enumerate((64, 128, 256, 512), start=1):
        for block in range(2):
            name = f"layer{stage}.{block}"
            convolution(f"{name}.conv1", f"{name}.bn1", width, inputs, 3)
            convolution(f"{name}.conv2", f"{name}.bn2", width, width, 3)
            if inputs != width:
                convolution(f"{name}.downsample.0", f"{name}.downsample.1", width, inputs, 1)
            inputs = width
    return shapes | {"fc.weight": (1000, 512), "fc.bias": (1000,)}


LOADS: dict[str, Shapes] = {
    "a CNN": CNN,
    "LoRA adapters of Llama-3.2-1B": LORA,
    "ResNet-18": _resnet18(),
    "GPT-2 124M": MODELS["gpt2"].shapes,
}


class _Update:
    """Parameters as they are sent, and what a client has made of them."""

    def __init__(self, shapes: Shapes) -> None:
        rng = np.random.default_rng(0)
        base = {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}
        self.base = ArrayRecord({name: Array(array) for name, array in base.items()})
        step = np.float32(0.01)
        self.new = {
            name: Array(array + step * rng.standard_normal(array.shape, np.float32))
            for name, array in base.items()
        }
        self.size = sum(array.size for array in base.values())
        self.replies: list[Message] = []

    def message(self, clipping_norm: float) -> Message:
        config = ConfigRecord({"clipping_norm": clipping_norm})
        return Message(
            RecordDict({"arrays": self.base, "config": config}), dst_node_id=1, message_type="train"
        )

    def prepare(self, message: Message, clients: int = 1) -> None:
        """Replies of clients, as they were before the last call wrote to them."""
        self.replies = [
            Message(
                RecordDict({"arrays": ArrayRecord(self.new), "metrics": MetricRecord({"num-examples": 1})}),
                reply_to=message,
            )
            for _ in range(clients)
        ]


def _mod_job(update: _Update, mod: Any, message: Message) -> Job:
    context = Context(run_id=1, node_id=1, node_config={}, state=RecordDict(), run_config={})

    def job() -> ArrayRecord:
        reply: Message = mod(message, context, lambda message, context: update.replies[0])
        return reply.content["arrays"]  # type: ignore[return-value]

    return job


class _Last(their_strategies.FedAvg):
    """Aggregates nothing: what a strategy of differential privacy does is timed, not what it wraps."""

    def aggregate_train(self, server_round: int, replies: Any) -> Any:
        self.last = [reply.content["arrays"] for reply in replies][-1]
        return None, None


def _server_job(update: _Update, strategies: Any, clients: int) -> Job:
    inner = _Last(fraction_train=0.0, fraction_evaluate=0.0)
    strategy = strategies.DifferentialPrivacyServerSideFixedClipping(inner, 1.0, 1.0, clients)
    strategy.configure_train(1, update.base, ConfigRecord(), SimpleNamespace(get_node_ids=list))

    def job() -> ArrayRecord:
        strategy.aggregate_train(1, update.replies)
        return inner.last  # type: ignore[no-any-return]

    return job


def _peak(job: Job, prepare: Job) -> int:
    prepare()
    tracemalloc.start()
    job()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


def _compare(what: str, load: str, update: _Update, jobs: list[Job], prepare: Job) -> Comparison:
    theirs, mine = jobs
    found = []
    for job in jobs:
        prepare()
        np.random.seed(0)  # noqa: NPY002 (Flower draws its noise from it)
        found.append(job().to_numpy_ndarrays())
    for a, b in zip(*found, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
    del found
    memory = _peak(mine, prepare) / _peak(theirs, prepare)
    return compare(
        f"Flower {version('flwr')}",
        what,
        f"{load}: {len(update.new)} arrays, {update.size / 1e6:.3g} M elements",
        theirs,
        mine,
        prepare=prepare,
        note=f"peak memory {memory:.2f} x",
        seconds=4.0,
        least=5,
    )


def measure() -> Iterator[Comparison]:
    logging.getLogger("flwr").setLevel(logging.ERROR)
    TaskIdentity.run_id = TaskIdentity.task_id = TaskIdentity.node_id = 1
    for load, shapes in LOADS.items():
        update = _Update(shapes)
        cases: list[tuple[str, float, Any]] = [("`fixedclipping_mod`", 1.0, None)]
        if load == "ResNet-18":
            cases.append(("`fixedclipping_mod`, below the bound", 1e6, None))
            cases.append(("`LocalDpMod`", 1.0, (1.0, 0.01, 1.0, 1e-5)))
        for what, clipping_norm, local in cases:
            message = update.message(clipping_norm)
            jobs = [
                _mod_job(update, where.LocalDpMod(*local) if local else where.fixedclipping_mod, message)
                for where in (their_mods, ours)
            ]
            yield _compare(what, load, update, jobs, partial(update.prepare, message))
        if load == "ResNet-18":
            message = update.message(1.0)
            jobs = [_server_job(update, where, 4) for where in (their_strategies, ours)]
            yield _compare(
                "`DifferentialPrivacyServerSideFixedClipping`, 4 clients", load, update, jobs,
                partial(update.prepare, message, 4),
            )  # fmt: skip
