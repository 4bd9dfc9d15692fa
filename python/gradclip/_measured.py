"""What was measured of gradients, between measuring and clipping them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NoReturn, Protocol

from gradclip._result import ClipResult, by_name, count_of, norm_rows

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    import numpy.typing as npt

    from gradclip._api import NonFinite, Rounding, Thresholds
    from gradclip._dispatch import Measurable, MeasuredGradients, ReadGradients

__all__ = ["Measured", "Policy", "clip", "formula_of", "is_policy", "with_params"]


class Policy(Protocol):
    """What turns measured norms into thresholds: it is passed where a threshold is.

    ``thresholds`` is all that a policy needs. What else it may have:

    * ``observe(result)``: called with the :class:`ClipResult` of every clip that did not raise.
    * ``groups``: for calls that give none; or a method that makes them of the names of the gradients
      (``None``, where these come in a sequence).
    * ``coefficients(measured)``, in place of ``thresholds``: what each group is multiplied by.
    * ``state_dict()`` and ``load_state_dict(state)``, for whoever saves a training.
    """

    def thresholds(self, measured: Measured) -> Thresholds:
        """One for all groups, or one for each; on a GPU best an array there, for which nothing waits."""


class Measured:
    """What was measured of gradients by :func:`gradclip.measure`, and the way from there to clipping them.

    Between the two anybody may decide: what is called here does not measure again, so that clipping by a
    threshold that was found in between costs as much as by one that was known before. It is for the
    gradients as they were measured, so it clips or scales once. A gradient that has been given other memory
    since is noticed, one whose elements somebody has changed is not.

    On a GPU the norms are arrays there, and what needs them on the host (``nonfinite``, ``named_norms()``,
    ``repr``) waits.

    Attributes:
        total_norm: Norm over all gradients, divided by ``grad_scale``; over all processes with ``reduce``.
        norms: One norm per gradient of this process, float64, shape ``(len(grads),)``. ``None`` entries have
            norm 0.
        group_norms: One norm per group, float64, as ``total_norm``.
        nonfinite: The gradients that hold an infinity or a NaN: their indices, or their names when the
            call was given a mapping.
        missing: The gradients that were ``None``, as in ``nonfinite``.
        names: The keys of the mapping that the call was given; ``None`` for a sequence.
        group_names: What the groups are called, where the call named them.
        group_sizes: How many elements each group has, int64, in this process; on the host also of a GPU.
        is_global: Whether all gradients are one group, so that a threshold is one number.
        penalty: As of :class:`ClipResult`.

    Example:
        >>> import numpy as np, gradclip
        >>> grads = {"w": np.array([3.0, 4.0]), "b": np.array([12.0])}
        >>> measured = gradclip.measure(grads)
        >>> measured.total_norm
        13.0
        >>> measured.clip_(max_norm=measured.norms.max()).coefficient == 12 / 13
        True
    """

    __slots__ = ("_measured",)

    def __init__(self, measured: MeasuredGradients) -> None:
        self._measured = measured

    @property
    def total_norm(self) -> float:
        return self._measured.total_norm  # type: ignore[no-any-return]

    @property
    def norms(self) -> npt.NDArray[np.float64]:
        return self._measured.norms  # type: ignore[no-any-return]

    @property
    def group_norms(self) -> npt.NDArray[np.float64]:
        return self._measured.group_norms  # type: ignore[no-any-return]

    @property
    def nonfinite(self) -> tuple[int, ...] | tuple[str, ...]:
        return self._measured.nonfinite

    @property
    def missing(self) -> tuple[int, ...] | tuple[str, ...]:
        return self._measured.missing

    @property
    def names(self) -> tuple[str, ...] | None:
        return self._measured.names

    @property
    def group_names(self) -> Sequence[str] | None:
        return self._measured.group_names

    @property
    def penalty(self) -> float:
        return self._measured.penalty  # type: ignore[no-any-return]

    @property
    def group_sizes(self) -> npt.NDArray[np.int64]:
        return self._measured.group_sizes

    @property
    def is_global(self) -> bool:
        return self._measured.is_global

    def named_norms(self) -> dict[str, float]:
        """The norm of every gradient by its name, as of :class:`ClipResult`."""
        return by_name(self._on_host().norms, self.names)

    def named_group_norms(self) -> dict[str, float]:
        """The norm of every group by its name, as of :class:`ClipResult`."""
        return by_name(self._on_host().group_norms, self.group_names)

    def _on_host(self) -> Any:
        # That of a GPU is copied, which waits.
        to_host = getattr(self._measured, "to_host", None)
        return self._measured if to_host is None else to_host()

    def clip_(
        self,
        max_norm: Thresholds | Policy,
        nonfinite: NonFinite = "raise",
        rounding: Rounding = "nearest",
    ) -> ClipResult:
        """Clip the gradients in place, as :func:`gradclip.clip_by_global_norm_` does after measuring them.

        Args:
            max_norm: As for :func:`gradclip.clip_by_global_norm_`.
            nonfinite: As for :func:`gradclip.clip_by_global_norm_`. After an error (``"raise"``) nothing has
                been written, and another choice may follow.
            rounding: As for :func:`gradclip.clip_by_global_norm_`.

        Returns:
            What was measured and done.

        Raises:
            TypeError: As for :func:`gradclip.clip_by_global_norm_`, of what it is given and writes.
            ValueError: The same; it has clipped or scaled before; an array has been given other memory.
            NonFiniteGradientError: As for :func:`gradclip.clip_by_global_norm_`.

        Example:
            >>> import numpy as np, gradclip
            >>> grads = [np.array([3.0, 4.0]), np.array([12.0])]
            >>> gradclip.measure(grads, groups="tensor").clip_([10.0, 6.0]).coefficient
            array([1. , 0.5])
        """
        return self.clip_by_formula_(max_norm, nonfinite, formula_of(rounding))

    def clip_by_formula_(
        self, max_norm: Thresholds | Policy, nonfinite: NonFinite, formula: str | float
    ) -> ClipResult:
        if not is_policy(max_norm):
            return self._measured.clip(max_norm, nonfinite, formula)
        policy: Any = max_norm
        scales = hasattr(policy, "coefficients")
        if scales and formula == "down":
            raise ValueError(
                f"rounding: expected 'nearest' with a {type(policy).__name__}, which gives coefficients, got "
                "'down'"
            )
        observe = getattr(policy, "observe", None)  # before anything is written
        decided = policy.coefficients(self) if scales else policy.thresholds(self)
        try:
            if scales:
                result = self._measured.scale(decided, nonfinite)
            else:
                result = self._measured.clip(decided, nonfinite, formula)
        except (TypeError, ValueError) as error:
            if not str(error).startswith(("max_norm", "coefficients")):
                raise
            raise type(error)(f"{error} (of {type(policy).__name__})") from None
        if observe is not None:
            observe(result)
        return result

    def scale_(self, coefficients: Any, nonfinite: NonFinite = "propagate") -> ClipResult:
        """Multiply each group in place by a coefficient that the caller has decided.

        Whatever the norms are; what was divided into them as ``grad_scale`` is divided out of memory, too.

        Args:
            coefficients: A finite number; or, unless ``groups`` was ``None``, also one per group, as
                thresholds are: in a sequence, or in a mapping by the names of the groups, ``None`` for 1.
                On a GPU also an array there; if it holds one that is not finite, nothing is written.
            nonfinite: As for :func:`gradclip.clip_by_global_norm_`; ``"propagate"``: multiply whatever the
                norms are.

        Returns:
            What was measured and done; ``clipped`` says whether a coefficient was not 1.

        Raises:
            TypeError: A coefficient is no number; a gradient is immutable.
            ValueError: A coefficient is not finite; there is not one for each group; it has clipped or scaled
                before; a gradient cannot be written.
            NonFiniteGradientError: As for :func:`gradclip.clip_by_global_norm_`.

        Example:
            >>> import numpy as np, gradclip
            >>> grads = {"w": np.array([3.0, 4.0]), "b": np.array([12.0])}
            >>> measured = gradclip.measure(grads, groups={"w": "first", "b": "second"})
            >>> measured.scale_({"first": 2.0, "second": None}).named_group_norms()
            {'first': 5.0, 'second': 12.0}
            >>> grads["w"]
            array([6., 8.])
        """
        return self._measured.scale(coefficients, nonfinite)

    def __reduce__(self) -> NoReturn:
        raise TypeError("Measured: expected no copy and no pickle of it, for it holds memory of this process")

    def __repr__(self) -> str:
        host = self._on_host()
        missing = f", {len(self.missing)} missing" if self.missing else ""
        head = f"Measured(total norm {host.total_norm:.6g}, {count_of(len(host.norms), 'gradient')}{missing}"
        return "\n".join([head, *norm_rows(host.norms, self.nonfinite, self.names)]) + ")"


def is_policy(max_norm: object) -> bool:
    return hasattr(max_norm, "thresholds") or hasattr(max_norm, "coefficients")


def formula_of(rounding: object) -> str:
    """The formula of a rounding. The engine says what is wrong with any other word."""
    if not isinstance(rounding, str):
        raise TypeError(f"rounding: expected 'nearest' or 'down', got {type(rounding).__name__}")
    return rounding


def with_params(read: ReadGradients, params: Any, l2: Any, l1: Any) -> Measurable:
    """Gradients and what weight regularisation adds to them, if it does."""
    if params is not None:
        pair = read.with_params(params, l2, l1)
        return pair if l2 != 0 or l1 != 0 else read
    if l2 != 0 or l1 != 0:
        raise ValueError(f"params: expected the parameters that are regularised (l2={l2}, l1={l1}), got None")
    return read


def clip(
    read: Any,
    max_norm: Any,
    ord: object,
    groups: object,
    grad_scale: object,
    nonfinite: Any,
    reduce: object,
    formula: str | float,
    params: Any = None,
    l2: Any = 0.0,
    l1: Any = 0.0,
) -> ClipResult:
    """Measure, decide and clip: in one call of the engine, unless a policy decides in between.

    ``formula``: how what is written is rounded, or a float that is added to norms, as PyTorch does.
    ``params``, ``l2``, ``l1``: as of :func:`with_params`.
    """
    # The usual call, without one of Python's: 0.0 is compared with a float at once, and a float is no policy.
    is_regularised = params is not None or l2 != 0.0 or l1 != 0.0
    source: Measurable = with_params(read, params, l2, l1) if is_regularised else read
    if type(max_norm) is not float and is_policy(max_norm):
        if groups is None:
            groups = getattr(max_norm, "groups", None)
            groups = groups(source.names) if callable(groups) else groups
        measured = Measured(source.measure(ord, groups, grad_scale, reduce))
        return measured.clip_by_formula_(max_norm, nonfinite, formula)
    return source.clip(max_norm, ord, groups, grad_scale, nonfinite, reduce, formula)
