"""Strategies of a ServerApp that clip on the server: Flower's, with gradclip's clip."""

from __future__ import annotations

from collections.abc import Iterable
from logging import ERROR
from typing import Any, cast

from flwr.app import ArrayRecord, Message, MetricRecord
from flwr.common import log
from flwr.serverapp import strategy as theirs
from flwr.serverapp.strategy import Strategy
from flwr.serverapp.strategy.dp_fixed_clipping import validate_replies
from flwr.supercore.privacy_accounting import PrivacyAccountant

from gradclip._result import NonFiniteGradientError
from gradclip.flower._mods import serialised, with_arrays
from gradclip.flower._update import checked_norm, clip_update, views

__all__ = ["DifferentialPrivacyServerSideAdaptiveClipping", "DifferentialPrivacyServerSideFixedClipping"]


class DifferentialPrivacyServerSideFixedClipping(theirs.DifferentialPrivacyServerSideFixedClipping):
    """Clip on the server to a fixed norm: in place of that of ``flwr.serverapp.strategy``.

    What is aggregated of a client has an exact L2 distance of at most ``clipping_norm`` from what was sent.
    Sampling, aggregation, noise and accounting are Flower's. An update that holds a NaN or an infinity is
    refused and the round left out, as Flower does when a client reports an error; the log names client and
    array.

    Args:
        strategy: That aggregates.
        noise_multiplier: As Flower has it.
        clipping_norm: Positive and finite.
        num_sampled_clients: As Flower has it.
        accountant: The same.

    Raises:
        TypeError: The clipping norm is no number.
        ValueError: The clipping norm is not positive and finite; another argument is wrong.

    Example:
        >>> from flwr.serverapp.strategy import FedAvg
        >>> from gradclip.flower import DifferentialPrivacyServerSideFixedClipping
        >>> DifferentialPrivacyServerSideFixedClipping(
        ...     FedAvg(), noise_multiplier=1.0, clipping_norm=0.5, num_sampled_clients=10
        ... )
        Differential Privacy Strategy Wrapper (Server-Side Fixed Clipping)
    """

    def __init__(
        self,
        strategy: Strategy,
        noise_multiplier: float,
        clipping_norm: float,
        num_sampled_clients: int,
        *,
        accountant: PrivacyAccountant | None = None,
    ) -> None:
        checked_norm(type(self).__name__, clipping_norm)
        super().__init__(
            strategy, noise_multiplier, clipping_norm, num_sampled_clients, accountant=accountant
        )

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Clip the replies in place, aggregate them, add noise."""
        replies = list(replies)
        if clip_replies(replies, self.current_arrays, self.clipping_norm) is None:
            self._pop_pending_event(server_round)  # nothing is released
            return None, None
        # All but the clip, which is done, is what Flower does where clients clip.
        rest = theirs.DifferentialPrivacyClientSideFixedClipping.aggregate_train
        return rest(cast(Any, self), server_round, replies)


class DifferentialPrivacyServerSideAdaptiveClipping(theirs.DifferentialPrivacyServerSideAdaptiveClipping):
    """Clip on the server to a norm that adapts: in place of that of ``flwr.serverapp.strategy``.

    The bound, and what is refused, are those of :class:`DifferentialPrivacyServerSideFixedClipping`. How the
    norm adapts (after Andrew et al. 2021, arXiv:1905.03871) and what noise is added are Flower's.

    Args:
        strategy: That aggregates.
        noise_multiplier: As Flower has it.
        num_sampled_clients: The same.
        initial_clipping_norm: Positive and finite.
        target_clipped_quantile: As Flower has it.
        clip_norm_lr: The same.
        clipped_count_stddev: The same.

    Raises:
        TypeError: The clipping norm is no number.
        ValueError: The clipping norm is not positive and finite; another argument is wrong.

    Example:
        >>> from flwr.serverapp.strategy import FedAvg
        >>> from gradclip.flower import DifferentialPrivacyServerSideAdaptiveClipping
        >>> strategy = DifferentialPrivacyServerSideAdaptiveClipping(
        ...     FedAvg(), noise_multiplier=0.1, num_sampled_clients=10
        ... )
        >>> strategy.clipping_norm
        0.1
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

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Clip the replies in place, adapt the norm, aggregate, add noise: in Flower's order."""
        replies = list(replies)
        if not validate_replies(replies, self.num_sampled_clients):
            return None, None
        norm_bits = clip_replies(replies, self.current_arrays, self.clipping_norm)
        if norm_bits is None:
            return None, None
        self._geometric_update(self._noisy_fraction(norm_bits, len(replies)))
        arrays, metrics = self.strategy.aggregate_train(server_round, replies)
        return self._add_noise_to_aggregated_arrays(arrays) if arrays else arrays, metrics


def clip_replies(replies: list[Message], sent: ArrayRecord, clipping_norm: float) -> int | None:
    """Clip the updates of all replies, each in its message.

    Returns:
        How many were clipped; ``None`` if one was refused, which the log names.
    """
    if any(reply.has_error() for reply in replies):
        return 0  # a round that Flower leaves out
    base = views("aggregate_train", serialised("aggregate_train", sent))
    norm_bits = 0
    for reply in replies:
        who = f"aggregate_train: client {reply.metadata.src_node_id}"
        for key, record in reply.content.array_records.items():
            try:
                clipped = clip_update(who, serialised(who, record), base, clipping_norm)
            except NonFiniteGradientError as error:
                log(ERROR, "%s. It is refused, and the round left out.", error)
                return None
            norm_bits += clipped.norm_bit
            reply.content[key] = with_arrays(clipped.arrays, record)
    return norm_bits
