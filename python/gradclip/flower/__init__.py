"""Flower's differential privacy with a clip that keeps its bound: mods and strategies under the same names.

>>> from flwr.serverapp.strategy import FedAvg
>>> from gradclip.flower import DifferentialPrivacyServerSideFixedClipping
>>> DifferentialPrivacyServerSideFixedClipping(FedAvg(), 1.0, clipping_norm=0.5, num_sampled_clients=10)
Differential Privacy Strategy Wrapper (Server-Side Fixed Clipping)

These are for messages with records (``flwr.clientapp.mod``, ``flwr.serverapp.strategy``); those for Flower's
older API are in :mod:`gradclip.flower.compat`. Which promise is kept where: ``docs/flower.md``.
"""

from gradclip._public import claim
from gradclip._versions import warn_if_untried

warn_if_untried("flwr", ["1.42"])

# Where clients clip, the strategy adds noise and counts, which is Flower's.
from flwr.serverapp.strategy import (  # noqa: E402
    DifferentialPrivacyClientSideAdaptiveClipping,
    DifferentialPrivacyClientSideFixedClipping,
)

from gradclip.flower._mods import LocalDpMod, adaptiveclipping_mod, fixedclipping_mod  # noqa: E402
from gradclip.flower._strategies import (  # noqa: E402
    DifferentialPrivacyServerSideAdaptiveClipping,
    DifferentialPrivacyServerSideFixedClipping,
)

__all__ = [
    "DifferentialPrivacyClientSideAdaptiveClipping",
    "DifferentialPrivacyClientSideFixedClipping",
    "DifferentialPrivacyServerSideAdaptiveClipping",
    "DifferentialPrivacyServerSideFixedClipping",
    "LocalDpMod",
    "adaptiveclipping_mod",
    "fixedclipping_mod",
]

claim(__name__)
