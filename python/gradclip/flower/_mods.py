"""Mods of a ClientApp: Flower's, with gradclip's clip."""

from __future__ import annotations

from collections.abc import Mapping

from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord
from flwr.clientapp import mod as theirs
from flwr.clientapp.mod.centraldp_mods import (
    _handle_array_key_mismatch_err,
    _handle_multi_record_err,
    _handle_no_key_err,
)
from flwr.clientapp.typing import ClientAppCallable
from flwr.common import Parameters
from flwr.common.constant import SType
from flwr.supercore.differential_privacy import (
    KEY_CLIPPING_NORM,
    KEY_NORM_BIT,
    add_localdp_gaussian_noise_to_params,
)

from gradclip.flower._update import checked_norm, clip_update, floating, view, views

__all__ = ["LocalDpMod", "adaptiveclipping_mod", "fixedclipping_mod"]


def fixedclipping_mod(msg: Message, ctxt: Context, call_next: ClientAppCallable) -> Message:
    """Clip on the client to a fixed norm: in place of ``flwr.clientapp.mod.fixedclipping_mod``.

    For the strategy :class:`DifferentialPrivacyClientSideFixedClipping`, which sends the clipping norm. The
    exact L2 norm of the update, of what is sent minus what was received, is at most that norm.

    Args:
        msg: From the server, with one ArrayRecord and one ConfigRecord.
        ctxt: Of the ClientApp.
        call_next: The next mod, or the ClientApp.

    Returns:
        The reply, with an update that is clipped; or Flower's error, where a record or a key is missing.

    Raises:
        NonFiniteGradientError: The update holds a NaN or an infinity. Of what a mod raises Flower makes an
            error reply, and the strategy leaves the round out.
        TypeError: The clipping norm is no number; an array has a dtype without norm.
        ValueError: The clipping norm is not positive and finite; an array has another shape than was sent.

    Example:
        >>> from flwr.clientapp import ClientApp
        >>> from gradclip.flower import fixedclipping_mod
        >>> app = ClientApp()
        >>> @app.train(mods=[fixedclipping_mod])
        ... def train(message, context): ...
    """
    clipping_norm = _sent_norm("fixedclipping_mod", msg)
    if isinstance(clipping_norm, Message):
        return clipping_norm
    return _clip_reply("fixedclipping_mod", msg, ctxt, call_next, clipping_norm)


def adaptiveclipping_mod(msg: Message, ctxt: Context, call_next: ClientAppCallable) -> Message:
    """Clip on the client to a norm that adapts: in place of ``flwr.clientapp.mod.adaptiveclipping_mod``.

    For the strategy :class:`DifferentialPrivacyClientSideAdaptiveClipping`, which sends the clipping norm and
    gets, with the metrics, whether it clipped (the norm bit). The bound is that of :func:`fixedclipping_mod`.

    Args:
        msg: As for :func:`fixedclipping_mod`.
        ctxt: The same.
        call_next: The same; its reply has one MetricRecord.

    Returns:
        As :func:`fixedclipping_mod`, with the norm bit.

    Raises:
        NonFiniteGradientError: As for :func:`fixedclipping_mod`.
        TypeError: The same.
        ValueError: The same.

    Example:
        >>> from flwr.clientapp import ClientApp
        >>> from gradclip.flower import adaptiveclipping_mod
        >>> app = ClientApp()
        >>> @app.train(mods=[adaptiveclipping_mod])
        ... def train(message, context): ...
    """
    clipping_norm = _sent_norm("adaptiveclipping_mod", msg)
    if isinstance(clipping_norm, Message):
        return clipping_norm
    return _clip_reply("adaptiveclipping_mod", msg, ctxt, call_next, clipping_norm, with_bit=True)


class LocalDpMod(theirs.LocalDpMod):
    """Clip on the client and add noise there: in place of ``flwr.clientapp.mod.LocalDpMod``.

    The bound is that of :func:`fixedclipping_mod`. To what was clipped Flower's own function adds noise, of
    standard deviation ``sensitivity * sqrt(2 * log(1.25 / delta)) / epsilon``; arrays of integers get none.

    Args:
        clipping_norm: Positive and finite.
        sensitivity: As Flower has it; two updates are at most ``2 * clipping_norm`` apart.
        epsilon: The privacy budget.
        delta: The probability that the promise does not hold.

    Raises:
        TypeError: The clipping norm is no number.
        ValueError: The clipping norm is not positive and finite; another argument is negative.

    Example:
        >>> from flwr.clientapp import ClientApp
        >>> from gradclip.flower import LocalDpMod
        >>> app = ClientApp()
        >>> @app.train(mods=[LocalDpMod(clipping_norm=1.0, sensitivity=2.0, epsilon=8.0, delta=1e-5)])
        ... def train(message, context): ...
    """

    def __init__(self, clipping_norm: float, sensitivity: float, epsilon: float, delta: float) -> None:
        checked_norm("LocalDpMod", clipping_norm)
        super().__init__(clipping_norm, sensitivity, epsilon, delta)

    def __call__(self, msg: Message, ctxt: Context, call_next: ClientAppCallable) -> Message:
        """Run the ClientApp, then clip and add noise."""
        if len(msg.content.array_records) != 1:
            return _handle_multi_record_err("LocalDpMod", msg, ArrayRecord)
        reply = _clip_reply("LocalDpMod", msg, ctxt, call_next, self.clipping_norm)
        if reply.has_error():
            return reply
        (record,) = reply.content.array_records.values()
        for name in record:  # one at a time, so that two copies of one array lie in memory, not of all
            data = noisy(name, record[name].data, self.sensitivity, self.epsilon, self.delta)
            record[name] = serialised_array(name, data)
        return reply


def noisy(name: str, data: bytes, sensitivity: float, epsilon: float, delta: float) -> bytes:
    """A serialised array with Flower's noise of local differential privacy; one of integers as it is."""
    if not floating(view("LocalDpMod", name, data)):
        return data
    one = Parameters([data], SType.NUMPY)
    return add_localdp_gaussian_noise_to_params(one, sensitivity, epsilon, delta).tensors[0]


def _sent_norm(who: str, msg: Message) -> float | Message:
    """The clipping norm that the server sent, or the error that Flower replies without one."""
    if len(msg.content.array_records) != 1:
        return _handle_multi_record_err(who, msg, ArrayRecord)
    if len(msg.content.config_records) != 1:
        return _handle_multi_record_err(who, msg, ConfigRecord)
    (config,) = msg.content.config_records.values()
    if KEY_CLIPPING_NORM not in config:
        return _handle_no_key_err(who, msg)
    return checked_norm(who, config[KEY_CLIPPING_NORM])


def _clip_reply(
    who: str,
    msg: Message,
    ctxt: Context,
    call_next: ClientAppCallable,
    clipping_norm: float,
    *,
    with_bit: bool = False,
) -> Message:
    """The client's reply to a message of one ArrayRecord, clipped; or an error, its own or Flower's."""
    (record,) = msg.content.array_records.values()
    sent = serialised(who, record)  # before the client, which may empty the record
    reply = call_next(msg, ctxt)
    if reply.has_error():
        return reply
    if len(reply.content.array_records) != 1:
        return _handle_multi_record_err(who, reply, ArrayRecord)
    if with_bit and len(reply.content.metric_records) != 1:
        return _handle_multi_record_err(who, reply, MetricRecord)
    ((key, record),) = reply.content.array_records.items()
    if list(sent) != list(record):
        return _handle_array_key_mismatch_err(who, reply)
    clipped = clip_update(who, serialised(who, record), views(who, sent), clipping_norm)
    reply.content.array_records[key] = with_arrays(clipped.arrays, record)
    if with_bit:
        (metrics,) = reply.content.metric_records.values()
        metrics[KEY_NORM_BIT] = int(clipped.norm_bit)
    return reply


def serialised(who: str, record: ArrayRecord) -> dict[str, bytes]:
    """The bytes of a record by the names of its arrays."""
    for name, array in record.items():
        if array.stype != SType.NUMPY:
            raise TypeError(f"{who}: {name!r}: expected serialisation {SType.NUMPY!r}, got {array.stype!r}")
    return {name: array.data for name, array in record.items()}


def with_arrays(changed: Mapping[str, bytes], record: ArrayRecord) -> ArrayRecord:
    """Another record like this one, with other bytes for some of its arrays."""
    return ArrayRecord(
        {
            name: serialised_array(name, changed[name]) if name in changed else array
            for name, array in record.items()
        }
    )


def serialised_array(name: str, data: bytes) -> Array:
    """These bytes as Flower has arrays."""
    array = view("gradclip.flower", name, data)
    return Array(str(array.dtype), array.shape, SType.NUMPY, data)
