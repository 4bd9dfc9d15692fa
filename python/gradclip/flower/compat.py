"""For Flower's older API (``FitIns``, ``FitRes``): of ``flwr.client.mod`` and ``flwr.server.strategy``.

>>> from flwr.server.strategy import FedAvg
>>> from gradclip.flower.compat import DifferentialPrivacyServerSideFixedClipping
>>> DifferentialPrivacyServerSideFixedClipping(FedAvg(), 1.0, clipping_norm=0.5, num_sampled_clients=10)
Differential Privacy Strategy Wrapper (Server-Side Fixed Clipping)
"""

from __future__ import annotations

from dataclasses import replace
from logging import ERROR
from typing import Any, TypeAlias, cast

from flwr.app import Context, Message, MessageType
from flwr.client import mod as their_mods
from flwr.clientapp.typing import ClientAppCallable
from flwr.common import FitIns, FitRes, Parameters, Scalar, log
from flwr.compat.common import recorddict_compat
from flwr.server import strategy as theirs
from flwr.server.client_manager import ClientManager
from flwr.server.client_proxy import ClientProxy
from flwr.server.strategy import (
    DifferentialPrivacyClientSideAdaptiveClipping,
    DifferentialPrivacyClientSideFixedClipping,
    Strategy,
)
from flwr.supercore.differential_privacy import (
    KEY_CLIPPING_NORM,
    KEY_NORM_BIT,
    add_gaussian_noise_to_params,
)

from gradclip._result import NonFiniteGradientError
from gradclip.flower._mods import noisy
from gradclip.flower._update import checked_norm, clip_update, views

__all__ = [
    "DifferentialPrivacyClientSideAdaptiveClipping",
    "DifferentialPrivacyClientSideFixedClipping",
    "DifferentialPrivacyServerSideAdaptiveClipping",
    "DifferentialPrivacyServerSideFixedClipping",
    "LocalDpMod",
    "adaptiveclipping_mod",
    "fixedclipping_mod",
]

_Results: TypeAlias = list[tuple[ClientProxy, FitRes]]
_Failures: TypeAlias = list[tuple[ClientProxy, FitRes] | BaseException]


def fixedclipping_mod(msg: Message, ctxt: Context, call_next: ClientAppCallable) -> Message:
    """Clip on the client to a fixed norm: the older API of :func:`gradclip.flower.fixedclipping_mod`.

    Args:
        msg: From the server; one that does not train passes.
        ctxt: Of the ClientApp.
        call_next: The next mod, or the ClientApp.

    Raises:
        KeyError: The server sent no clipping norm.
        NonFiniteGradientError: The update holds a NaN or an infinity.
        TypeError: As for :func:`gradclip.flower.fixedclipping_mod`.
        ValueError: The same.
    """
    if msg.metadata.message_type != MessageType.TRAIN:
        return call_next(msg, ctxt)
    who = "fixedclipping_mod"
    fit_ins = recorddict_compat.recorddict_to_fitins(msg.content, keep_input=True)
    return _clip_reply(who, msg, ctxt, call_next, fit_ins, _sent_norm(who, fit_ins))


def adaptiveclipping_mod(msg: Message, ctxt: Context, call_next: ClientAppCallable) -> Message:
    """Clip on the client to an adaptive norm: the older API of :func:`gradclip.flower.adaptiveclipping_mod`.

    Args:
        msg: As for :func:`fixedclipping_mod`.
        ctxt: The same.
        call_next: The same.

    Raises:
        KeyError: As for :func:`fixedclipping_mod`.
        NonFiniteGradientError: The same.
        TypeError: The same.
        ValueError: The same.
    """
    if msg.metadata.message_type != MessageType.TRAIN:
        return call_next(msg, ctxt)
    who = "adaptiveclipping_mod"
    fit_ins = recorddict_compat.recorddict_to_fitins(msg.content, keep_input=True)
    return _clip_reply(who, msg, ctxt, call_next, fit_ins, _sent_norm(who, fit_ins), with_bit=True)


class LocalDpMod(their_mods.LocalDpMod):
    """Clip on the client and add noise there: :class:`gradclip.flower.LocalDpMod` for the older API.

    Args:
        clipping_norm: As there.
        sensitivity: The same.
        epsilon: The same.
        delta: The same.
    """

    def __init__(self, clipping_norm: float, sensitivity: float, epsilon: float, delta: float) -> None:
        checked_norm("LocalDpMod", clipping_norm)
        super().__init__(clipping_norm, sensitivity, epsilon, delta)

    def __call__(self, msg: Message, ctxt: Context, call_next: ClientAppCallable) -> Message:
        """Run the ClientApp, then clip and add noise."""
        if msg.metadata.message_type != MessageType.TRAIN:
            return call_next(msg, ctxt)
        fit_ins = recorddict_compat.recorddict_to_fitins(msg.content, keep_input=True)
        reply = _clip_reply("LocalDpMod", msg, ctxt, call_next, fit_ins, self.clipping_norm)
        if reply.has_error():
            return reply
        fit_res = recorddict_compat.recorddict_to_fitres(reply.content, keep_input=True)
        tensors = fit_res.parameters.tensors
        for i, data in enumerate(tensors):
            tensors[i] = noisy(str(i), data, self.sensitivity, self.epsilon, self.delta)
        reply.content = recorddict_compat.fitres_to_recorddict(fit_res, keep_input=True)
        return reply


class DifferentialPrivacyServerSideFixedClipping(theirs.DifferentialPrivacyServerSideFixedClipping):
    """Clip on the server to a fixed norm, for the older API.

    As :class:`gradclip.flower.DifferentialPrivacyServerSideFixedClipping`, without an accountant.

    Args:
        strategy: As there.
        noise_multiplier: The same.
        clipping_norm: The same.
        num_sampled_clients: The same.
    """

    def __init__(
        self, strategy: Strategy, noise_multiplier: float, clipping_norm: float, num_sampled_clients: int
    ) -> None:
        checked_norm(type(self).__name__, clipping_norm)
        super().__init__(strategy, noise_multiplier, clipping_norm, num_sampled_clients)
        self._sent = Parameters([], "")

    def configure_fit(
        self, server_round: int, parameters: Parameters, client_manager: ClientManager
    ) -> list[tuple[ClientProxy, FitIns]]:
        """Configure the next round, and keep what is sent."""
        self._sent = parameters
        return self.strategy.configure_fit(server_round, parameters, client_manager)

    def aggregate_fit(
        self, server_round: int, results: _Results, failures: _Failures
    ) -> tuple[Parameters | None, dict[str, Scalar]]:
        """Clip the results in place, aggregate them, add noise."""
        if failures or _clip_results(results, self._sent, self.clipping_norm) is None:
            return None, {}
        # All but the clip, which is done, is what Flower does where clients clip.
        rest = theirs.DifferentialPrivacyClientSideFixedClipping.aggregate_fit
        return rest(cast(Any, self), server_round, results, failures)


class DifferentialPrivacyServerSideAdaptiveClipping(theirs.DifferentialPrivacyServerSideAdaptiveClipping):
    """Clip on the server to a norm that adapts, for the older API.

    As :class:`gradclip.flower.DifferentialPrivacyServerSideAdaptiveClipping`.

    Args:
        strategy: As there.
        noise_multiplier: The same.
        num_sampled_clients: The same.
        initial_clipping_norm: The same.
        target_clipped_quantile: The same.
        clip_norm_lr: The same.
        clipped_count_stddev: The same.
    """

    def __init__(
        self,
        strategy: Strategy,
        noise_multiplier: float,
        num_sampled_clients: int,
        initial_clipping_norm: float = 0.1,
        target_clipped_quantile: float = 0.5,
        clip_norm_lr: float = 0.2,
        clipped_count_stddev: float | None = None,
    ) -> None:
        checked_norm(type(self).__name__, initial_clipping_norm)
        super().__init__(
            strategy,
            noise_multiplier,
            num_sampled_clients,
            initial_clipping_norm,
            target_clipped_quantile,
            clip_norm_lr,
            clipped_count_stddev,
        )
        self._sent = Parameters([], "")

    def configure_fit(
        self, server_round: int, parameters: Parameters, client_manager: ClientManager
    ) -> list[tuple[ClientProxy, FitIns]]:
        """Configure the next round, and keep what is sent."""
        self._sent = parameters
        return self.strategy.configure_fit(server_round, parameters, client_manager)

    def aggregate_fit(
        self, server_round: int, results: _Results, failures: _Failures
    ) -> tuple[Parameters | None, dict[str, Scalar]]:
        """Clip the results in place, adapt the norm, aggregate, add noise: in Flower's order."""
        norm_bits = None if failures else _clip_results(results, self._sent, self.clipping_norm)
        if norm_bits is None:
            return None, {}
        # How the norm adapts is what Flower does with the bits of clients that clip.
        bits = [
            (client, replace(result, metrics={KEY_NORM_BIT: bit}))
            for (client, result), bit in zip(results, norm_bits, strict=True)
        ]
        theirs.DifferentialPrivacyClientSideAdaptiveClipping._update_clip_norm(cast(Any, self), bits)
        parameters, metrics = self.strategy.aggregate_fit(server_round, results, failures)
        if parameters:
            parameters = add_gaussian_noise_to_params(
                parameters, self.noise_multiplier, self.clipping_norm, self.num_sampled_clients
            )
        return parameters, metrics


def _by_position(parameters: Parameters) -> dict[str, bytes]:
    return {str(i): data for i, data in enumerate(parameters.tensors)}


def _clipped_parameters(
    who: str, parameters: Parameters, sent: Parameters, clipping_norm: float
) -> tuple[Parameters, bool]:
    arrays = _by_position(parameters)
    clipped = clip_update(who, arrays, views(who, _by_position(sent)), clipping_norm)
    return Parameters(list({**arrays, **clipped.arrays}.values()), parameters.tensor_type), clipped.norm_bit


def _sent_norm(who: str, fit_ins: FitIns) -> float:
    if KEY_CLIPPING_NORM not in fit_ins.config:
        raise KeyError(
            f"{who}: {KEY_CLIPPING_NORM!r}: expected in the config, which the strategies "
            "DifferentialPrivacyClientSide...Clipping send, got none"
        )
    return checked_norm(who, fit_ins.config[KEY_CLIPPING_NORM])


def _clip_reply(
    who: str,
    msg: Message,
    ctxt: Context,
    call_next: ClientAppCallable,
    fit_ins: FitIns,
    clipping_norm: float,
    *,
    with_bit: bool = False,
) -> Message:
    reply = call_next(msg, ctxt)
    if reply.has_error():
        return reply
    fit_res = recorddict_compat.recorddict_to_fitres(reply.content, keep_input=True)
    fit_res.parameters, norm_bit = _clipped_parameters(
        who, fit_res.parameters, fit_ins.parameters, clipping_norm
    )
    if with_bit:
        fit_res.metrics[KEY_NORM_BIT] = norm_bit
    reply.content = recorddict_compat.fitres_to_recorddict(fit_res, keep_input=True)
    return reply


def _clip_results(results: _Results, sent: Parameters, clipping_norm: float) -> list[bool] | None:
    """Clip the updates of all results in place; which were clipped, or ``None`` if one was refused."""
    norm_bits = []
    for client, result in results:
        who = f"aggregate_fit: client {client.cid}"
        try:
            result.parameters, norm_bit = _clipped_parameters(who, result.parameters, sent, clipping_norm)
        except NonFiniteGradientError as error:
            log(ERROR, "%s. It is refused, and the round left out.", error)
            return None
        norm_bits.append(norm_bit)
    return norm_bits
