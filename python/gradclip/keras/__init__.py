"""``clipnorm``, ``global_clipnorm`` and ``clipvalue`` of any optimizer of Keras 3, through gradclip.

Example::

    import gradclip.keras
    gradclip.keras.install()     # all optimizers of the process, before or after they are made
"""

try:
    import keras as _keras  # noqa: F401
except ModuleNotFoundError as _error:
    if _error.name != "keras":
        raise
    raise ModuleNotFoundError(
        "gradclip.keras: expected Keras 3 to be installed: pip install 'gradclip[keras]'", name="keras"
    ) from None

from gradclip._public import claim
from gradclip._reroute import Stats
from gradclip.keras._install import install, patched, stats, uninstall
from gradclip.keras._optimizers import ClippingMixin, clip_state, clipping, last_result, named_norms

__all__ = [
    "ClippingMixin",
    "Stats",
    "clip_state",
    "clipping",
    "install",
    "last_result",
    "named_norms",
    "patched",
    "stats",
    "uninstall",
]

claim(__name__)
