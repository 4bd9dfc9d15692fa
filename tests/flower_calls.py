"""Calls of mods and strategies of Flower and of gradclip.flower, of both of Flower's APIs, with arrays."""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import flwr.client.mod
import flwr.clientapp.mod
import flwr.server.strategy
import flwr.serverapp.strategy
import numpy as np
from flwr.app import Array as FlowerArray
from flwr.app import (
    ArrayRecord,
    ConfigRecord,
    Context,
    Error,
    Message,
    MessageType,
    MetricRecord,
    RecordDict,
)
from flwr.common import Code, FitIns, FitRes, Status, ndarrays_to_parameters, parameters_to_ndarrays
from flwr.compat.common import recorddict_compat
from flwr.supercore.task_identity import TaskIdentity

import gradclip.flower
import gradclip.flower.compat
from matrices import Array

Arrays: TypeAlias = dict[str, Array]
SERVER, CLIENT = 7, 11


@contextmanager
def running() -> Iterator[None]:
    """Inside of a task, as who makes messages has to be."""
    TaskIdentity.run_id, TaskIdentity.task_id, TaskIdentity.node_id = 1, 2, SERVER
    try:
        yield
    finally:
        for name in ("_run_id", "_task_id", "_node_id"):
            setattr(TaskIdentity, name, None)


def record(arrays: Arrays) -> ArrayRecord:
    return ArrayRecord({name: FlowerArray(array) for name, array in arrays.items()})


def arrays_of(arrays: ArrayRecord) -> Arrays:
    return dict(zip(arrays, arrays.to_numpy_ndarrays(), strict=True))


@dataclass
class Reply:
    """What a mod has made of a client's reply."""

    arrays: Arrays = field(default_factory=dict)
    norm_bit: int | None = None
    error: str = ""
    is_same: bool = False  # the bytes that the client had


@dataclass
class Round:
    """What a strategy has made of the replies of a round."""

    clipped: list[Arrays] = field(default_factory=list)  # as the strategy inside gets them
    aggregated: Arrays | None = None


class Messages:
    """Messages with records."""

    name = "messages"
    ours: Any = gradclip.flower
    mods: Any = flwr.clientapp.mod
    strategies: Any = flwr.serverapp.strategy

    @staticmethod
    def message(base: Arrays, config: dict[str, Any]) -> Message:
        content = RecordDict({"arrays": record(base), "config": ConfigRecord(config)})
        return Message(content, dst_node_id=CLIENT, message_type=MessageType.TRAIN)

    @staticmethod
    def reply(message: Message, new: Arrays) -> Message:
        content = RecordDict({"arrays": record(new), "metrics": MetricRecord({"num-examples": 2})})
        return Message(content, reply_to=message)

    def clip(self, mod: Any, base: Arrays, new: Arrays, clipping_norm: Any = 1.0) -> Reply:
        client = ClientReply(lambda message: self.reply(message, new))
        out = mod(self.message(base, {"clipping_norm": clipping_norm}), no_context(), client)
        if out.has_error():
            return Reply(error=out.error.reason)
        arrays: ArrayRecord = out.content["arrays"]
        is_same = [a.data for a in arrays.values()] == client.data
        return Reply(arrays_of(arrays), out.content["metrics"].get("norm_bit"), is_same=is_same)

    @staticmethod
    def error(base: Arrays) -> Message:
        return Message(Error(1, "a client's own"), reply_to=Messages.message(base, {}))

    def aggregate(self, strategy: Any, base: Arrays, news: list[Any]) -> Round:
        """``strategy`` makes one of another one; a reply is arrays, or a message."""
        found = Round()

        class Inner(flwr.serverapp.strategy.FedAvg):
            def aggregate_train(self, server_round: int, replies: Any) -> Any:
                found.clipped = [arrays_of(reply.content["arrays"]) for reply in replies]
                return super().aggregate_train(server_round, replies)

        wrapped = strategy(Inner(fraction_train=0.0, fraction_evaluate=0.0, min_train_nodes=0))
        wrapped.configure_train(1, record(base), ConfigRecord(), types.SimpleNamespace(get_node_ids=list))
        sent = self.message(base, {})
        replies = [new if isinstance(new, Message) else self.reply(sent, new) for new in news]
        arrays, _ = wrapped.aggregate_train(
            1, iter(replies) if "gradclip" in type(wrapped).__module__ else replies
        )
        found.aggregated = None if arrays is None else arrays_of(arrays)
        return found


class Fit:
    """``FitIns`` and ``FitRes``: the older API."""

    name = "fit"
    ours: Any = gradclip.flower.compat
    mods: Any = flwr.client.mod
    strategies: Any = flwr.server.strategy

    @staticmethod
    def message(base: Arrays, config: dict[str, Any]) -> Message:
        content = recorddict_compat.fitins_to_recorddict(
            FitIns(ndarrays_to_parameters(list(base.values())), config), keep_input=True
        )
        return Message(content, dst_node_id=CLIENT, message_type=MessageType.TRAIN)

    @staticmethod
    def result(new: Arrays) -> FitRes:
        return FitRes(Status(Code.OK, ""), ndarrays_to_parameters(list(new.values())), 2, {})

    def reply(self, message: Message, new: Arrays) -> Message:
        content = recorddict_compat.fitres_to_recorddict(self.result(new), keep_input=True)
        return Message(content, reply_to=message)

    def clip(self, mod: Any, base: Arrays, new: Arrays, clipping_norm: Any = 1.0) -> Reply:
        client = ClientReply(lambda message: self.reply(message, new))
        out = mod(self.message(base, {"clipping_norm": clipping_norm}), no_context(), client)
        if out.has_error():
            return Reply(error=out.error.reason)
        fit_res = recorddict_compat.recorddict_to_fitres(out.content, keep_input=True)
        arrays = parameters_to_ndarrays(fit_res.parameters)
        bit: Any = fit_res.metrics.get("norm_bit")
        is_same = fit_res.parameters.tensors == client.data
        return Reply(dict(zip(new, arrays, strict=True)), bit, is_same=is_same)

    def aggregate(self, strategy: Any, base: Arrays, news: list[Any]) -> Round:
        found = Round()

        def named(parameters: Any) -> Arrays:
            return dict(zip(base, parameters_to_ndarrays(parameters), strict=True))

        class Inner(flwr.server.strategy.FedAvg):
            def configure_fit(self, server_round: int, parameters: Any, client_manager: Any) -> Any:
                return []

            def aggregate_fit(self, server_round: int, results: Any, failures: Any) -> Any:
                found.clipped = [named(result.parameters) for _, result in results]
                return super().aggregate_fit(server_round, results, failures)

        wrapped = strategy(Inner(fit_metrics_aggregation_fn=lambda metrics: {}))
        wrapped.configure_fit(1, ndarrays_to_parameters(list(base.values())), None)
        client = types.SimpleNamespace(cid=str(CLIENT))
        results = [(client, self.result(new)) for new in news if isinstance(new, dict)]
        failures = [new for new in news if not isinstance(new, dict)]
        parameters, _ = wrapped.aggregate_fit(1, results, failures)
        found.aggregated = None if parameters is None else named(parameters)
        return found

    @staticmethod
    def error(base: Arrays) -> Any:
        return RuntimeError("a client's own")


class ClientReply:
    """A ClientApp; ``data`` is what it serialised."""

    def __init__(self, make: Callable[[Message], Message]) -> None:
        self.make = make
        self.data: list[bytes] = []

    def __call__(self, message: Message, context: Context) -> Message:
        reply = self.make(message)
        ((_, arrays),) = reply.content.array_records.items()
        self.data = [array.data for array in arrays.values()]
        return reply


def no_context() -> Context:
    return Context(run_id=1, node_id=CLIENT, node_config={}, state=RecordDict(), run_config={})


APIS: tuple[Any, ...] = (Messages(), Fit())


def exact_square(new: Arrays, base: Arrays) -> Any:
    """The squared L2 norm of the difference of floating-point arrays, as a fraction."""
    from fractions import Fraction  # noqa: PLC0415

    total = Fraction(0)
    for name, array in new.items():
        if array.dtype.kind in "iub":
            continue
        parts = np.stack([np.atleast_1d(a).astype(np.complex128).ravel() for a in (array, base[name])])
        for a, b in parts.view(np.float64).T.reshape(-1, 2).tolist():
            total += (Fraction(a) - Fraction(b)) ** 2
    return total
