"""Flower's mods and strategies by gradclip: the same answers, an exact bound, refusals where Flower errs."""

from __future__ import annotations

import inspect
import logging
import re
import tracemalloc
from collections.abc import Callable, Iterator
from io import BytesIO
from typing import Any

import numpy as np
import pytest
from flwr.app import Array as FlowerArray
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAvg
from flwr.supercore.privacy_accounting import (
    NeighboringRelation,
    PrivacyConfig,
    PrivacySpent,
    SamplingMethod,
)

import gradclip
import gradclip.flower
from flower_calls import (
    APIS,
    Arrays,
    Messages,
    Reply,
    Round,
    arrays_of,
    exact_square,
    no_context,
    record,
    running,
)
from gradclip.flower._update import view
from matrices import REAL_NAMES, values
from processes import output_of

pytestmark = pytest.mark.usefixtures("task")
STRATEGIES = ("DifferentialPrivacyServerSideFixedClipping", "DifferentialPrivacyServerSideAdaptiveClipping")
MODS = ("fixedclipping_mod", "adaptiveclipping_mod", "LocalDpMod")
_SIDES = [(api, name) for api in APIS for name in (*MODS, *STRATEGIES)]
sides = pytest.mark.parametrize(("api", "name"), _SIDES, ids=[f"{api.name}-{name}" for api, name in _SIDES])
apis = pytest.mark.parametrize("api", APIS, ids=[api.name for api in APIS])


@pytest.fixture
def task() -> Iterator[None]:
    with running():
        yield


@pytest.fixture
def logged() -> Iterator[list[str]]:
    """What Flower's logger was given."""
    lines: list[str] = []

    class Handler(logging.Handler):
        def emit(self, line: logging.LogRecord) -> None:
            lines.append(f"{line.levelname}: {line.getMessage()}")

    handler, logger = Handler(), logging.getLogger("flwr")
    logger.addHandler(handler)
    yield lines
    logger.removeHandler(handler)


def _mod(where: Any, name: str, clipping_norm: float, sensitivity: float = 0.0) -> Any:
    """A mod; that of local differential privacy without noise."""
    if name == "LocalDpMod":
        return where.LocalDpMod(clipping_norm, sensitivity, 1.0, 1e-5)
    return getattr(where, name)


def _strategy(where: Any, name: str, norm: float, clients: int, noise: float = 0.0) -> Callable[[Any], Any]:
    if "Adaptive" in name:
        stddev = 1.0 if noise else 0.0
        return lambda inner: getattr(where, name)(inner, noise, clients, norm, clipped_count_stddev=stddev)
    return lambda inner: getattr(where, name)(inner, noise, norm, clients)


def _clipped(api: Any, name: str, base: Arrays, new: Arrays, norm: float, where: Any = None) -> Arrays:
    """What becomes of one update, by a mod or a strategy."""
    if name in MODS:
        where = where or api.ours
        reply: Reply = api.clip(_mod(where, name, norm), base, new, norm)
        return reply.arrays
    round_: Round = api.aggregate(_strategy(where or api.ours, name, norm, 1), base, [new])
    return round_.clipped[0] if round_.clipped else {}


def _model(dtype: str, seed: int = 0) -> tuple[Arrays, Arrays]:
    """Parameters, and what a client has made of them."""
    shapes: dict[str, tuple[int, ...]] = {"w": (5, 30), "b": (30,), "scale": (), "none": (0, 3)}
    base = {name: values(dtype, shape, seed=seed, low=-3, high=1) for name, shape in shapes.items()}
    new = {name: values(dtype, shape, seed=seed + 1, low=-3, high=1) for name, shape in shapes.items()}
    new["w"] = np.asfortranarray(new["w"])
    return base, new


# --- the bound ----------------------------------------------------------------------------------------


@sides
@pytest.mark.parametrize("dtype", [*(name for name in REAL_NAMES if name != "bfloat16"), "complex64"])
def test_the_bound_is_exact(api: Any, name: str, dtype: str) -> None:
    for seed in range(6):
        base, new = _model(dtype, seed=10 * seed)
        norm = float(exact_square(new, base)) ** 0.5
        for factor in (0.01, 0.3, 0.9999):
            after = _clipped(api, name, base, new, norm * factor)
            square = exact_square(after, base)
            assert square <= type(square)(norm * factor) ** 2
            # Each element may lose a unit in the last place of its parameter.
            ulp = {"float16": 2.0**-9, "float64": 1e-14}.get(dtype, 2.0**-21)
            assert float(square) ** 0.5 >= norm * factor * (1 - 1e-6) - ulp * 20
            assert [a.dtype for a in after.values()] == [a.dtype for a in new.values()]


@apis
def test_flower_is_above_the_bound(api: Any) -> None:
    """Of what the test above would find."""
    above = 0
    for seed in range(30):
        base, new = _model("float32", seed=seed)
        after = _clipped(api, "fixedclipping_mod", base, new, 0.5, api.mods)
        above += exact_square(after, base) > 0.25
    assert above > 5


@sides
def test_an_update_below_the_bound_keeps_its_bits(api: Any, name: str) -> None:
    base, new = _model("float32")
    norm = float(exact_square(new, base)) ** 0.5
    for limit in (norm * 1.001, 1e30):
        after = _clipped(api, name, base, new, limit)
        assert {k: a.tobytes() for k, a in after.items()} == {k: a.tobytes() for k, a in new.items()}
    if name in MODS[:2]:
        assert api.clip(_mod(api.ours, name, 1e30), base, new, 1e30).is_same


@sides
def test_other_dtypes_than_were_sent(api: Any, name: str) -> None:
    """A client that trains in another precision: as NumPy subtracts, so nothing is lost before the clip."""
    for sent, trained, common in (
        ("f4", "f8", "f8"),
        ("f8", "f4", "f8"),
        ("f2", "f4", "f4"),
        ("f4", "f2", "f4"),
    ):
        base, new = {"w": np.linspace(0, 1, 50).astype(sent)}, {"w": np.linspace(2, 1, 50).astype(trained)}
        after = _clipped(api, name, base, new, 0.7)
        assert after["w"].dtype == common
        assert exact_square(after, base) <= exact_square({"w": np.array(0.7)}, {"w": np.array(0.0)})
        theirs = _clipped(api, name, base, new, 0.7, api.mods if name in MODS else api.strategies)
        np.testing.assert_allclose(after["w"], theirs["w"], rtol=2e-3 if "f2" in (sent, trained) else 1e-5)


# --- the same answers as Flower -----------------------------------------------------------------------


@apis
def test_names_and_signatures(api: Any) -> None:
    assert set(api.ours.__all__) == set(MODS) | {
        f"DifferentialPrivacy{side}Side{kind}Clipping"
        for side in ("Client", "Server")
        for kind in ("Fixed", "Adaptive")
    }
    for name in api.ours.__all__:
        ours = getattr(api.ours, name)
        theirs = getattr(api.mods if name in MODS else api.strategies, name)
        parameters = [
            [(p.name, p.kind, p.default) for p in inspect.signature(f).parameters.values()]
            for f in (ours, theirs)
        ]
        assert parameters[0] == parameters[1]
        assert inspect.isfunction(ours) or issubclass(ours, theirs)


@apis
@pytest.mark.parametrize("name", MODS)
def test_the_same_as_flowers_mods(api: Any, name: str) -> None:
    for seed in range(8):
        base, new = _model("float32", seed=seed)
        del base["scale"], new["scale"]  # which Flower sends as it is
        for norm in (0.3, 3.0, 1e3):
            replies = []
            for where in (api.ours, api.mods):
                np.random.seed(seed)  # noqa: NPY002 (Flower draws from it)
                replies.append(api.clip(_mod(where, name, norm, sensitivity=0.1), base, new, norm))
            ours, theirs = replies
            assert ours.norm_bit == theirs.norm_bit
            for key, array in theirs.arrays.items():
                assert ours.arrays[key].dtype == array.dtype
                np.testing.assert_allclose(ours.arrays[key], array, rtol=1e-5, atol=1e-6)


@apis
@pytest.mark.parametrize("name", STRATEGIES)
@pytest.mark.parametrize("noise", [0.0, 0.5])
def test_the_same_as_flowers_strategies(api: Any, name: str, noise: float) -> None:
    base, _ = _model("float32")
    del base["scale"]
    news = [{k: v for k, v in _model("float32", seed=s)[1].items() if k in base} for s in range(1, 5)]
    news[2] = {k: (base[k] + v / 1000).astype("f4") for k, v in news[2].items()}  # one is not clipped
    wrapped: list[Any] = []

    def made(where: Any) -> Callable[[Any], Any]:
        def wrap(inner: Any) -> Any:
            wrapped.append(_strategy(where, name, 1.5, len(news), noise)(inner))
            return wrapped[-1]

        return wrap

    rounds = []
    for where in (api.ours, api.strategies):
        np.random.seed(3)  # noqa: NPY002
        rounds.append(api.aggregate(made(where), base, news))
    ours, theirs = rounds
    assert len(ours.clipped) == len(theirs.clipped) == 4
    for a, b in zip([*ours.clipped, ours.aggregated], [*theirs.clipped, theirs.aggregated], strict=True):
        for key in base:
            np.testing.assert_allclose(a[key], b[key], rtol=1e-5, atol=1e-6)
    assert wrapped[0].clipping_norm == wrapped[1].clipping_norm
    assert (wrapped[0].clipping_norm != 1.5) == ("Adaptive" in name)
    assert repr(wrapped[0]) == repr(wrapped[1])


@apis
@pytest.mark.parametrize("name", STRATEGIES)
def test_a_round_with_failures_is_left_out(api: Any, name: str) -> None:
    base, new = _model("float32")
    found = api.aggregate(_strategy(api.ours, name, 1.0, 2), base, [new, api.error(base)])
    assert found.aggregated is None
    assert not found.clipped


class Accountant:
    """Flower's protocol, which counts what is composed."""

    def __init__(self) -> None:
        self.config = PrivacyConfig(
            target_delta=1e-5,
            population_size=10,
            sampling_method=SamplingMethod.NO_AMPLIFICATION,
            neighboring_relation=NeighboringRelation.ADD_OR_REMOVE_ONE,
        )
        self.events: list[Any] = []

    def compose(self, event: Any, count: int = 1) -> None:
        self.events.append(event)

    def get_privacy_spent(self, delta: float | None = None) -> PrivacySpent:
        return PrivacySpent(1.0, 1e-5, len(self.events), "counting", 2.0)


@pytest.mark.parametrize("where", [gradclip.flower, Messages.strategies], ids=["ours", "Flower's"])
def test_accounting_is_flowers(where: Any) -> None:
    """One event for a round that is released, none for one that is not; unequal weights are refused."""
    base, new = _model("float32")
    accountant: Any = Accountant()
    strategy = where.DifferentialPrivacyServerSideFixedClipping(
        FedAvg(fraction_evaluate=0.0), 1.0, 1.0, 2, accountant=accountant
    )
    message = Messages.message(base, {})
    grid: Any = type("Grid", (), {"get_node_ids": lambda self: [1, 2]})()

    def aggregate(round_: int, replies: list[Message]) -> Any:
        strategy.configure_train(round_, record(base), ConfigRecord(), grid)
        return strategy.aggregate_train(round_, replies)

    arrays, _ = aggregate(1, [Messages.reply(message, new) for _ in range(2)])
    assert arrays
    assert len(accountant.events) == 1
    assert accountant.events[0].noise_multiplier == 1.0
    assert aggregate(2, [Messages.reply(message, new)]) == (None, None)
    replies = [Messages.reply(message, new) for _ in range(2)]
    replies[1].content["metrics"] = MetricRecord({"num-examples": 3})
    with pytest.raises(ValueError, match="equal client weights"):
        aggregate(3, replies)
    if where is gradclip.flower:
        bad = {**new, "w": np.full_like(new["w"], np.nan)}
        assert aggregate(4, [Messages.reply(message, new), Messages.reply(message, bad)]) == (None, None)
    assert len(accountant.events) == 1
    assert not strategy._pending_events


# --- where Flower errs --------------------------------------------------------------------------------


@apis
@pytest.mark.parametrize("name", MODS)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_mod_refuses_what_is_not_finite(api: Any, name: str, bad: float) -> None:
    base, new = _model("float32")
    new["b"][3] = bad
    key = "'b'" if api.name == "messages" else "'1'"
    what = "1 NaN and 0 inf" if np.isnan(bad) else "0 NaN and 1 inf"
    text = re.escape(f"{name}: expected an update of finite elements: {key} holds {what}")
    with pytest.raises(gradclip.NonFiniteGradientError, match=f"^{text}$") as caught:
        api.clip(_mod(api.ours, name, 1.0), base, new)
    assert len(caught.value.entries) == 1
    base["b"][3] = np.nan  # what was sent
    with pytest.raises(gradclip.NonFiniteGradientError, match="holds 1 NaN and 0 inf"):
        api.clip(_mod(api.ours, name, 1.0), base, new)


@pytest.mark.parametrize("name", MODS)
def test_many_bad_arrays_and_a_norm_beyond_float64(name: str) -> None:
    base = {str(i): np.zeros(2) for i in range(8)}
    new = {key: np.full(2, np.nan) for key in base}
    with pytest.raises(
        gradclip.NonFiniteGradientError, match=r"'4' holds 2 NaN and 0 inf; and 3 more arrays$"
    ):
        Messages().clip(_mod(gradclip.flower, name, 1.0), base, new)
    new = {key: np.full(2, 1.7e308) for key in base}
    with pytest.raises(gradclip.NonFiniteGradientError, match=r"its norm is beyond float64$"):
        Messages().clip(_mod(gradclip.flower, name, 1.0), base, new)


@apis
@pytest.mark.parametrize("name", STRATEGIES)
def test_a_strategy_refuses_what_is_not_finite(api: Any, name: str, logged: list[str]) -> None:
    base, new = _model("float32")
    bad = {**new, "w": np.full_like(new["w"], np.inf)}
    wrapped: list[Any] = []

    def wrap(inner: Any) -> Any:
        wrapped.append(_strategy(api.ours, name, 1.0, 2)(inner))
        return wrapped[-1]

    found = api.aggregate(wrap, base, [new, bad])
    assert found.aggregated is None
    assert not found.clipped
    assert wrapped[0].clipping_norm == 1.0
    call, key = ("aggregate_train", "'w'") if api.name == "messages" else ("aggregate_fit", "'0'")
    assert (
        f"ERROR: {call}: client 11: expected an update of finite elements: {key} holds 0 NaN and 150 inf. "
        "It is refused, and the round left out."
    ) in logged


@sides
def test_a_scalar_is_clipped(api: Any, name: str) -> None:
    base, new = (
        {"w": np.zeros((), "f4"), "v": np.zeros(1, "f4")},
        {"w": np.array(3, "f4"), "v": np.array([4], "f4")},
    )
    after = _clipped(api, name, base, new, 0.5)
    assert after["w"].shape == ()
    np.testing.assert_allclose([after["w"], after["v"][0]], [0.3, 0.4], rtol=1e-6)
    theirs = _clipped(api, name, base, new, 0.5, api.mods if name in MODS else api.strategies)
    assert theirs["w"] == 3  # or this test may go


@sides
def test_a_zero_update_passes(api: Any, name: str) -> None:
    base, _ = _model("float32")
    after = _clipped(api, name, base, base, 0.5)
    assert {k: a.tobytes() for k, a in after.items()} == {k: a.tobytes() for k, a in base.items()}
    if name == "adaptiveclipping_mod":
        assert api.clip(api.ours.adaptiveclipping_mod, base, base, 0.5).norm_bit == 0


@sides
def test_large_float16_updates(api: Any, name: str) -> None:
    """Of a norm beyond 65504, where Flower's is inf: it sends no update at all."""
    base = {"w": np.full(1000, -3e4, "f2")}
    new = {"w": np.full(1000, 3e4, "f2")}
    after = _clipped(api, name, base, new, 6e4 * 1000**0.5 / 2)
    np.testing.assert_allclose(after["w"].astype(float), 0, atol=32)


@sides
def test_integers_are_left_alone_and_reported(api: Any, name: str, logged: list[str]) -> None:
    base: Arrays = {"w": np.zeros(4, "f4"), "batches": np.array(7), "mask": np.array([True, False])}
    new: Arrays = {"w": np.full(4, 2, "f4"), "batches": np.array(9000), "mask": np.array([False, False])}
    after = _clipped(api, name, base, new, 1.0)
    assert {key: after[key].tolist() for key in ("batches", "mask")} == {
        "batches": 9000, "mask": [False, False],
    }  # fmt: skip
    np.testing.assert_allclose(after["w"], 0.5, rtol=1e-6)
    assert after["batches"].dtype == np.int64
    keys = ("'batches'", "'mask'") if api.name == "messages" else ("'1'", "'2'")
    warning = f"not clipped, for they are no floating-point arrays: {keys[0]} (int64), {keys[1]} (bool)"
    assert sum(warning in line and line.startswith("WARNING") for line in logged) == 1
    del base["w"], new["w"]
    assert _clipped(api, name, base, new, 1.0)["batches"] == 9000
    assert any("no floating-point array in the update, so nothing is clipped" in line for line in logged)


@apis
def test_integers_get_no_local_noise(api: Any) -> None:
    base: Arrays = {"w": np.zeros(4, "f4"), "batches": np.arange(500)}
    after = api.clip(_mod(api.ours, "LocalDpMod", 1.0, sensitivity=50.0), base, base).arrays
    assert np.abs(after["w"]).min() > 0
    assert after["batches"].tolist() == list(range(500))


@apis
@pytest.mark.parametrize("name", MODS)
def test_an_empty_model(api: Any, name: str, logged: list[str]) -> None:
    assert api.clip(_mod(api.ours, name, 1.0), {}, {}).arrays == {}
    assert any("no floating-point array in the update" in line for line in logged)


def test_a_client_may_empty_what_it_was_sent() -> None:
    """As ``to_numpy_ndarrays(keep_input=False)`` does, to save memory."""
    base, new = _model("float32")

    def client(message: Message, context: Any) -> Message:
        ((_, arrays),) = message.content.array_records.items()
        arrays.clear()
        return Messages.reply(message, new)

    message = Messages.message(base, {"clipping_norm": 1.0})
    out = gradclip.flower.fixedclipping_mod(message, no_context(), client)
    assert exact_square(arrays_of(out.content["arrays"]), base) <= 1  # type: ignore[arg-type]


def test_what_the_client_keeps_is_not_written() -> None:
    base, new = _model("float32")
    kept = record(new)

    def client(message: Message, context: Any) -> Message:
        return Message(RecordDict({"arrays": kept}), reply_to=message)

    before = [array.data for array in kept.values()]
    copies = [bytes(bytearray(data)) for data in before]
    gradclip.flower.fixedclipping_mod(Messages.message(base, {"clipping_norm": 0.1}), no_context(), client)
    assert [array.data for array in kept.values()] == before == copies


@pytest.mark.parametrize("name", STRATEGIES)
def test_arrays_are_paired_by_name(name: str) -> None:
    """Where the names are those that were sent, in whatever order; else by position, as Flower does."""
    base, new = _model("float32")
    turned = dict(reversed(new.items()))
    straight, turned = (_clipped(Messages(), name, base, x, 0.1) for x in (new, turned))
    assert {k: a.tobytes() for k, a in straight.items()} == {k: a.tobytes() for k, a in turned.items()}
    numbered = {str(i): a for i, a in enumerate(new.values())}
    after = _clipped(Messages(), name, base, numbered, 0.1)
    assert [a.tobytes() for a in after.values()] == [a.tobytes() for a in straight.values()]


# --- bad input ----------------------------------------------------------------------------------------


@sides
def test_arrays_that_do_not_fit(api: Any, name: str) -> None:
    base, new = _model("float32")
    is_keyed = api.name == "messages"
    wrong: list[tuple[Arrays, type[Exception], str]] = [
        (
            {**new, "b": new["b"][:1]},
            ValueError,
            "{b}: expected shape (30,), as the server sent it, got (1,)",
        ),
        ({**new, "b": np.array(["x"] * 30)}, TypeError, "expected dtype float16, bfloat16"),
    ]
    if name in STRATEGIES or not is_keyed:  # a mod of messages: Flower's error reply, below
        wrong.append(({"w": new["w"]}, ValueError, "expected 4 arrays, as the server sent, got 1"))
    for arrays, error, text in wrong:
        with pytest.raises(error, match=re.escape(text.format(b="'b'" if is_keyed else "'1'"))):
            _clipped(api, name, base, arrays, 1.0)
    base["b"] = np.arange(30)
    with pytest.raises(TypeError, match="expected int64, as the server sent it, got float32"):
        _clipped(api, name, base, new, 1.0)


def _header(text: str) -> bytes:
    return b"\x93NUMPY\x01\x00\x76\x00" + text.encode().ljust(0x76) + b"A" * 8


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x93NUMPY",
        b"\x93NUMPY\x01\x00\x76\x00{",
        b"PK\x03\x04 of a zip",
        _header("{'descr': '|O', 'fortran_order': False, 'shape': (1,), }"),  # pointers
        _header("{'descr': '<f8', 'fortran_order': False, 'shape': (2,), }"),  # too short
        _header("{'descr': '<f8', 'fortran_order': False, 'shape': (-1,), }"),
        _header("{'descr': '<f8', 'fortran_order': False, 'shape': (2**60, 2**60), }"),
    ],
)
def test_bytes_that_are_no_array(data: bytes) -> None:
    with pytest.raises(ValueError, match=r"^who: 'w': expected an array as numpy.save writes it, got: "):
        view("who", "w", data)


def test_other_formats_of_numpy() -> None:
    """What ``numpy.save`` writes of long records, in another version of its format."""
    file = BytesIO()
    np.lib.format.write_array(file, np.arange(3.0), version=(2, 0))
    assert view("who", "w", file.getvalue()).tolist() == [0, 1, 2]
    message = Messages.message({"w": np.zeros(3)}, {"clipping_norm": 1.0})

    def client(message: Message, context: Any) -> Message:
        array = FlowerArray("float64", (3,), "numpy.ndarray", file.getvalue())
        return Message(RecordDict({"arrays": ArrayRecord({"w": array})}), reply_to=message)

    out = gradclip.flower.fixedclipping_mod(message, no_context(), client)
    after = arrays_of(out.content["arrays"])  # type: ignore[arg-type]
    np.testing.assert_allclose(after["w"], np.arange(3) / 5**0.5)


def test_another_serialisation_is_refused() -> None:
    message = Messages.message({"w": np.zeros(3)}, {"clipping_norm": 1.0})

    def client(message: Message, context: Any) -> Message:
        array = FlowerArray("float64", (3,), "mine", b"")
        return Message(RecordDict({"arrays": ArrayRecord({"w": array})}), reply_to=message)

    with pytest.raises(
        TypeError, match=r"fixedclipping_mod: 'w': expected serialisation 'numpy.ndarray', got 'mine'"
    ):
        gradclip.flower.fixedclipping_mod(message, no_context(), client)


@apis
@pytest.mark.parametrize(
    ("norm", "error"),
    [
        (0.0, ValueError),
        (-1.0, ValueError),
        (np.nan, ValueError),
        (np.inf, ValueError),
        ("1", TypeError),
        (True, TypeError),
    ],
)
def test_clipping_norms(api: Any, norm: Any, error: type[Exception]) -> None:
    base, new = _model("float32")
    text = f"clipping_norm: expected a .*number, got {norm if error is ValueError else type(norm).__name__}"
    for name in MODS[:2]:
        with pytest.raises(error, match=f"{name}: {text}"):
            api.clip(getattr(api.ours, name), base, new, norm)
    with pytest.raises(error, match=f"LocalDpMod: {text}"):
        api.ours.LocalDpMod(norm, 1.0, 1.0, 1e-5)
    for name in STRATEGIES:
        with pytest.raises(error, match=f"{name}: {text}"):
            _strategy(api.ours, name, norm, 1)(FedAvg())


def test_flowers_own_errors() -> None:
    """Records and keys that are missing: the reply is that of Flower's mod."""
    base, new = _model("float32")
    two = RecordDict({"a": record(base), "b": record(base), "config": ConfigRecord({"clipping_norm": 1.0})})

    def with_metrics(message: Message, context: Any) -> Message:
        return Messages.reply(message, new)

    def with_other_keys(message: Message, context: Any) -> Message:
        return Messages.reply(message, {f"{key}2": a for key, a in new.items()})

    def without_metrics(message: Message, context: Any) -> Message:
        return Message(RecordDict({"arrays": record(new)}), reply_to=message)

    def without_arrays(message: Message, context: Any) -> Message:
        return Message(RecordDict({"metrics": MetricRecord({})}), reply_to=message)

    def with_error(message: Message, context: Any) -> Message:
        return Messages.error(base)

    right = Messages.message(base, {"clipping_norm": 1.0})
    cases: list[tuple[Message, Any]] = [
        (Message(two, dst_node_id=1, message_type="train"), with_metrics),
        (Messages.message(base, {}), with_metrics),
        (right, with_other_keys),
        (right, without_metrics),
        (right, without_arrays),
        (right, with_error),
    ]
    two_configs = RecordDict({"a": record(base), "b": ConfigRecord({}), "c": ConfigRecord({})})
    cases.append((Message(two_configs, dst_node_id=1, message_type="train"), with_metrics))
    errors = 0
    for message, client in cases:
        for name in MODS:
            replies = [_mod(where, name, 1.0)(message, no_context(), client)
                       for where in (gradclip.flower, Messages.mods)]  # fmt: skip
            assert replies[0].has_error() == replies[1].has_error()
            if replies[0].has_error():
                errors += 1
                assert (replies[0].error.code, replies[0].error.reason) == (
                    replies[1].error.code, replies[1].error.reason,
                )  # fmt: skip
    assert errors == 17


@pytest.mark.parametrize("name", MODS[:2])
def test_a_missing_key_of_the_older_api(name: str) -> None:
    api = APIS[1]
    message = api.message({"w": np.zeros(2)}, {})
    for where in (api.ours, api.mods):
        with pytest.raises(KeyError, match="clipping_norm"):
            getattr(where, name)(message, no_context(), lambda message, context: message)


@pytest.mark.parametrize("name", MODS)
def test_the_older_mods_pass_what_does_not_train(name: str) -> None:
    message = Message(RecordDict(), dst_node_id=1, message_type="evaluate")
    mod = _mod(APIS[1].ours, name, 1.0)
    assert mod(message, no_context(), lambda message, context: message) is message


def test_a_version_that_was_not_tried() -> None:
    """One warning, of whoever imports."""
    code = """
    import importlib.metadata, warnings
    warnings.simplefilter("default")
    import flwr.clientapp
    version = importlib.metadata.version
    importlib.metadata.version = lambda package: "1.420.0" if package == "flwr" else version(package)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        import gradclip.flower.compat
    found = [w for w in caught if issubclass(w.category, UserWarning)]
    print(*((w.message, w.filename) for w in found))
    """
    assert output_of(code) == (
        "(UserWarning('flwr: expected 1.42, which gradclip was tried with, got 1.420.0'), '<string>')"
    )


# --- memory -------------------------------------------------------------------------------------------


@apis
@pytest.mark.parametrize("name", MODS)
def test_half_the_memory(api: Any, name: str) -> None:
    rng = np.random.default_rng(0)
    base = {str(i): rng.standard_normal(2**17).astype("f4") for i in range(16)}  # 8 MB
    message = api.message(base, {"clipping_norm": 1.0})
    peaks = []
    for where in (api.ours, api.mods):
        reply = api.reply(message, {k: a + 1 for k, a in base.items()})
        mod = _mod(where, name, 1.0, sensitivity=0.1)
        tracemalloc.start()
        mod(message, no_context(), lambda message, context, reply=reply: reply)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[0] <= 0.5 * peaks[1], peaks
