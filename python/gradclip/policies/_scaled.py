"""Thresholds in proportion to something else than past norms: to parameters, to sizes, to the norm itself."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from gradclip._dispatch import read
from gradclip.policies._base import (
    MeasuredGroups,
    StatefulPolicy,
    in_range,
    operations_of,
    positive,
)

__all__ = ["AGC", "Normalized", "UpdateRMS"]


class AGC(StatefulPolicy):
    """Each output unit in proportion to that of its parameter (Brock et al. 2021, arXiv:2102.06171).

    Adaptive gradient clipping, as of NFNets. A unit is one index of the axis that ``axis`` names; a vector or
    a scalar (a bias, a gain) is one unit. Its threshold is ``clipping * max(norm of the parameter's unit,
    eps)``. The parameters are measured in the same call: 1 N more is read.

    Args:
        params: The parameters, one for each gradient, of its shape: a sequence, or a mapping if the gradients
            are one (``dict(model.named_parameters())`` for :func:`gradclip.torch.clip_module_`). They are
            only read, and must be written in place, as optimizers do.
        clipping: The factor; lambda in the paper.
        eps: So that what begins as zero can move.
        axis: 0 for the layout of PyTorch, ``(out, in, ...)``; -1 for that of JAX, Keras and TensorFlow,
            ``(..., in, out)``.

    Example:
        >>> import numpy as np, gradclip
        >>> from gradclip.policies import AGC
        >>> params = {"w": np.array([[3.0, 4.0], [0.0, 0.0]])}
        >>> grads = {"w": np.array([[1.0, 0.0], [1.0, 0.0]])}
        >>> gradclip.clip_by_global_norm_(grads, AGC(params)).coefficient
        array([5.e-02, 1.e-05])
    """

    _options: ClassVar = ("clipping", "eps", "axis")

    def __init__(self, params: Any, clipping: float = 0.01, eps: float = 1e-3, axis: int = 0) -> None:
        self.clipping = positive("clipping", clipping)
        self.eps = positive("eps", eps)
        if isinstance(axis, bool) or axis not in (0, -1):
            raise ValueError(f"axis: expected 0 or -1, got {axis!r}")
        self.axis = axis
        self.groups = "unit" if axis == 0 else "unit_last"
        if params is None:
            raise TypeError("params: expected the parameters, got None")
        self._params = dict(params) if isinstance(params, Mapping) else list(params)

    def _limits(self, measured: MeasuredGroups) -> Any:
        units = read(self._beside(measured)).measure(2, self.groups, 1.0, None).group_norms
        norms = measured.group_norms
        if units.shape != norms.shape:
            raise ValueError(
                f"params: expected {norms.shape[0]} units along axis {self.axis}, as the gradients have with "
                f"groups={self.groups!r}, got {units.shape[0]}"
            )
        return self.clipping * operations_of(units).where(units > self.eps, units, self.eps)

    def _beside(self, measured: MeasuredGroups) -> dict[str, Any] | list[Any]:
        """The parameters of the gradients that there are; those of torch without autograd."""
        count, names = len(measured.norms), measured.names
        params, missing = self._params, set(measured.missing)
        if isinstance(params, Mapping):
            if names is None:
                raise TypeError("params: expected a sequence, as the gradients are one, got a mapping")
            for name in names:
                if name not in params:
                    raise ValueError(f"params: expected a parameter for the gradient {name!r}, got none")
            return {name: None if name in missing else _detached(params[name]) for name in names}
        if len(params) != count:
            raise ValueError(f"params: expected one for each of the {count} gradients, got {len(params)}")
        entries = range(count) if names is None else names
        return [
            None if entry in missing else _detached(param)
            for entry, param in zip(entries, params, strict=True)
        ]


def _detached(param: Any) -> Any:
    return param.detach() if getattr(param, "requires_grad", False) else param


class UpdateRMS(StatefulPolicy):
    """The root mean square of each tensor (Shazeer and Stern 2018, arXiv:1804.04235, of Adafactor's updates).

    The threshold of a tensor is ``d * sqrt(its number of elements)``, so that the root mean square of its
    elements is at most ``d``: Adafactor's ``u / max(1, RMS(u) / d)``. Sizes are those of this process: not
    for shards.

    Args:
        d: The highest root mean square.

    Example:
        >>> import numpy as np, gradclip
        >>> from gradclip.policies import UpdateRMS
        >>> update = [np.full(4, 3.0)]
        >>> gradclip.clip_by_global_norm_(update, UpdateRMS()).coefficient
        array([0.33333333])
    """

    groups = "tensor"
    _options: ClassVar = ("d",)

    def __init__(self, d: float = 1.0) -> None:
        self.d = positive("d", d)

    def _limits(self, measured: MeasuredGroups) -> Any:
        return self.d * np.sqrt(measured.group_sizes)


class Normalized(StatefulPolicy):
    """Gradients of one norm, whatever theirs is: up as well as down (Hazan et al. 2015, arXiv:1507.02030).

    Each group becomes ``g * norm / (its norm + eps)``: normalised gradient descent. Without ``groups`` all
    gradients together, with ``"tensor"`` each layer (as LARS does before it looks at weights). A group of
    norm 0 stays.

    Args:
        norm: What it is to be.
        eps: Added to the norm that is divided by.

    Example:
        >>> import numpy as np, gradclip
        >>> from gradclip.policies import Normalized
        >>> grads = [np.array([0.3, 0.4])]
        >>> gradclip.clip_by_global_norm_(grads, Normalized(eps=0.0)).coefficient
        2.0
    """

    _options: ClassVar = ("norm", "eps")

    def __init__(self, norm: float = 1.0, eps: float = 1e-8) -> None:
        self.norm = positive("norm", norm)
        self.eps = in_range("eps", eps, 0, 1e300)

    def coefficients(self, measured: MeasuredGroups) -> Any:
        """What each group is multiplied by."""
        with np.errstate(all="ignore"):
            norms = measured.group_norms
            found = self.norm / (norms + self.eps)
            usable = operations_of(norms).where((norms > 0) & (found < 1e308), found, 1.0)
        return usable[0] if measured.is_global else usable
