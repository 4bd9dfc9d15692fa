"""Federated trainings on Flower's own engine: a script, which writes what came to a file.

    python tests/flower_simulation.py FOLDER_OF_RAY FILE.json
    python tests/flower_simulation.py FOLDER_OF_RAY PAGE.md

The second line runs the code of a page, which prints what came.

Three clients hold a third of scikit-learn's digits each and train a softmax regression. One simulation, since
its engine (Ray) takes longer to start than all trainings.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import ray
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.clientapp import mod as their_mods
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp import strategy as their_strategies
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation
from sklearn.datasets import load_digits  # type: ignore[import-untyped]

import gradclip.flower

CLIENTS, ROUNDS, NORM = 3, 2, 3.0
X, Y = load_digits(return_X_y=True)
X = (X / 16).astype(np.float32)
WHERE: dict[str, tuple[Any, Any]] = {
    "ours": (gradclip.flower, gradclip.flower),
    "theirs": (their_mods, their_strategies),
}
app, server = ClientApp(), ServerApp()
found: dict[str, Any] = {}


def mod_of_the_config(msg: Message, ctxt: Context, call_next: Any) -> Message:
    """The mod that the training is about: one ClientApp for all of them."""
    (config,) = msg.content.config_records.values()
    name = str(config["mod"])
    if not name:
        return call_next(msg, ctxt)  # type: ignore[no-any-return]
    mod = getattr(WHERE[str(config["where"])][0], name)
    if name == "LocalDpMod":
        mod = mod(clipping_norm=NORM, sensitivity=0.01, epsilon=1.0, delta=1e-5)
    return mod(msg, ctxt, call_next)  # type: ignore[no-any-return]


@app.train(mods=[mod_of_the_config])
def train(msg: Message, ctxt: Context) -> Message:
    ((key, arrays),) = msg.content.array_records.items()
    (config,) = msg.content.config_records.values()
    w, b = arrays.to_numpy_ndarrays()
    part = int(ctxt.node_config["partition-id"])
    x, y = X[part::CLIENTS], Y[part::CLIENTS]
    for _ in range(30):
        scores = np.exp(x @ w + b)
        error = scores / scores.sum(1, keepdims=True)
        error[np.arange(len(y)), y] -= 1
        w -= 2 / len(y) * x.T @ error
        b -= 2 / len(y) * error.sum(0)
    if config["bad"] and part == 1:
        b[4] = np.nan
    content = RecordDict({key: record(w, b), "metrics": MetricRecord({"num-examples": len(y)})})
    return Message(content, reply_to=msg)


def record(w: Any, b: Any) -> ArrayRecord:
    return ArrayRecord({"w": Array(w), "b": Array(b)})


class Watched(FedAvg):
    """Keeps what reaches the aggregation: the updates of all clients."""

    def __init__(self) -> None:
        super().__init__(fraction_evaluate=0.0, min_available_nodes=CLIENTS)
        self.updates: list[Any] = []

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        self.sent = arrays.to_numpy_ndarrays()
        return super().configure_train(server_round, arrays, config, grid)

    def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> Any:
        replies = list(replies)
        for reply in replies:
            (arrays,) = reply.content.array_records.values()
            new = arrays.to_numpy_ndarrays()
            self.updates.append([(a.tolist(), b.tolist()) for a, b in zip(new, self.sent, strict=True)])
        return super().aggregate_train(server_round, replies)


def run(grid: Grid, where: str, name: str, mod: str = "", *, noise: float = 0, bad: bool = False) -> None:
    """A training by one strategy, or without one of differential privacy."""
    watched = Watched()
    strategy: Any = watched
    if name:
        make = getattr(WHERE[where][1], name)
        if "Adaptive" in name:
            strategy = make(watched, noise, CLIENTS, NORM, clipped_count_stddev=0.0)
        else:
            strategy = make(watched, noise, NORM, CLIENTS)
    accuracies: list[float] = []
    errors: list[str] = []
    aggregate = strategy.aggregate_train

    def listen(server_round: int, replies: Iterable[Message]) -> Any:
        replies = list(replies)
        errors.extend(str(reply.error.reason) for reply in replies if reply.has_error())
        return aggregate(server_round, replies)

    strategy.aggregate_train = listen

    def evaluate(server_round: int, arrays: ArrayRecord) -> MetricRecord:
        w, b = arrays.to_numpy_ndarrays()
        accuracies.append(float(np.mean((X @ w + b).argmax(1) == Y)))
        return MetricRecord({"accuracy": accuracies[-1]})

    result = strategy.start(
        grid,
        record(np.zeros((64, 10), np.float32), np.zeros(10, np.float32)),
        num_rounds=1 if bad else ROUNDS,
        train_config=ConfigRecord({"where": where, "mod": mod, "bad": bad}),
        evaluate_fn=evaluate,
    )
    found["/".join([where, name, mod, "noise" * bool(noise), "bad" * bad])] = {
        "accuracies": accuracies,
        "errors": errors,
        "updates": watched.updates,
        "arrays": [array.tolist() for array in result.arrays.to_numpy_ndarrays()],
        "norm": getattr(strategy, "clipping_norm", None),
    }


@server.main()
def main(grid: Grid, context: Context) -> None:
    client, on_server = "DifferentialPrivacyClientSide{}Clipping", "DifferentialPrivacyServerSide{}Clipping"
    for where in WHERE:
        run(grid, where, client.format("Fixed"), "fixedclipping_mod")
        run(grid, where, client.format("Adaptive"), "adaptiveclipping_mod")
        run(grid, where, on_server.format("Fixed"))
        run(grid, where, on_server.format("Adaptive"))
    run(grid, "ours", on_server.format("Fixed"), noise=0.01)
    run(grid, "ours", "", "LocalDpMod")
    run(grid, "ours", client.format("Fixed"), "fixedclipping_mod", bad=True)
    run(grid, "ours", on_server.format("Fixed"), bad=True)


def start_engine(folder: str) -> None:
    """Ray, as Flower's backend would start it, on the loopback interface.

    Twice if need be: it gives up where a process of its own takes more than 15 s to start (ray#65983).
    """
    for attempt in (1, 2):
        try:
            ray.init(
                num_cpus=2,
                include_dashboard=False,
                object_store_memory=100 * 2**20,
                _node_ip_address="127.0.0.1",
                _temp_dir=folder,
            )
            return
        except Exception:
            ray.shutdown()
            if attempt == 2:
                raise


if __name__ == "__main__":
    start_engine(sys.argv[1])
    path = Path(sys.argv[2])
    if path.suffix == ".md":
        for code in re.findall(r"```python\n(.*?)```", path.read_text(), re.DOTALL):
            exec(code, {"__name__": "__main__"})
    else:
        one_each = {"client_resources": {"num_cpus": 1, "num_gpus": 0.0}}
        run_simulation(server, app, CLIENTS, backend_config=one_each)  # type: ignore[arg-type]
        path.write_text(json.dumps(found))
