"""The public functions. Everything they do happens in an engine, in one pass over the arrays."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, SupportsFloat, TypeAlias

import numpy as np
import numpy.typing as npt

from gradclip import _core
from gradclip._dispatch import read_and_see
from gradclip._jax_arrays import read_norms
from gradclip._measured import Measured, Policy, clip, formula_of, with_params
from gradclip._result import ClipResult, warn_of_nothing

__all__ = [
    "accumulate_",
    "clip_by_global_norm_",
    "clip_by_norm_",
    "clip_by_value_",
    "clip_difference_",
    "get_num_threads",
    "global_norm",
    "measure",
    "row_norms",
    "scale_",
    "set_num_threads",
    "show_config",
    "tensor_norms",
]

# Any array that an engine can read in place: NumPy, CuPy, or anything with __dlpack__.
GradientArrays: TypeAlias = Mapping[str, Any] | Iterable[Any]
# One for all groups, or one for each of several: in their order, or by their names. Of rows one, or one for
# each row, for each gradient.
_OfRows: TypeAlias = npt.NDArray[np.floating[Any]] | Sequence[float]
Thresholds: TypeAlias = (
    SupportsFloat
    | Sequence[float | _OfRows | None]
    | Mapping[str, float | _OfRows | None]
    | npt.NDArray[np.floating[Any]]
)
Grouping: TypeAlias = (
    Sequence[int]
    | Sequence[str]
    | Mapping[str, int]
    | Mapping[str, str]
    | npt.NDArray[np.integer[Any]]
    | None
)
NonFinite: TypeAlias = Literal["raise", "skip", "zero", "propagate"]
Rounding: TypeAlias = Literal["nearest", "down"]
Reduce: TypeAlias = Callable[[npt.NDArray[np.float64]], npt.ArrayLike]


def tensor_norms(grads: GradientArrays, ord: float = 2) -> npt.NDArray[np.float64]:
    """Measure the norm of every gradient in one pass over memory.

    Every norm has a relative error of at most 2^-22 (float16, bfloat16, float32, complex64) or 1e-14
    (float64, complex128), also where squares overflow or underflow; see ``docs/reduction-order.md``.
    The bits of a norm depend on the gradient's dtype and elements alone.

    Args:
        grads: A sequence of arrays, or a mapping of names to arrays: ``numpy.ndarray``,
            ``cupy.ndarray`` or any object with ``__dlpack__`` (on a GPU also
            ``__cuda_array_interface__``), all on one device, of dtype float16, bfloat16, float32,
            float64, complex64 or complex128, of any shape and layout. ``None`` entries are skipped and
            have norm 0. Entries may be pytrees of JAX arrays, in the order of ``jax.tree.leaves``; of
            arrays with several shards, each shard on this process's devices counts once.
        ord: Which norm: 2 (Euclidean), 1 (sum of magnitudes), ``inf`` (largest magnitude), or any
            p > 0 for ``sum(abs(g)**p)**(1/p)``. 2, 1 and ``inf`` are fast (of complex numbers: 2).

    Returns:
        float64 array of shape ``(len(grads),)``. A norm is infinite only if an element is infinite or
        the true norm is beyond float64; it is NaN if an element is NaN. Of arrays on a GPU, an array
        there, on the current stream: nothing waits.

    Raises:
        TypeError: An entry is not an array or has another dtype; a key is not a string.
        ValueError: An entry lives on another device; ``ord`` is not positive.
        RuntimeError: The arrays are on a GPU, and gradclip cannot reach it; it says why not.

    Example:
        >>> import numpy as np, gradclip
        >>> gradclip.tensor_norms([np.array([3.0, 4.0]), None, np.full(4, 1e200)])
        array([5.e+000, 0.e+000, 2.e+200])
    """
    norms: npt.NDArray[np.float64] = read_norms(grads).tensor_norms(ord)
    return norms


def row_norms(grads: GradientArrays, ord: float = 2) -> list[npt.NDArray[np.float64]]:
    """Measure the norm of every row of every gradient in one pass over memory.

    A row is one index of the first axis: an output unit of a layer, an expert, a head, an example of
    per-example gradients. Its norm has the bits of that row as a gradient of its own:
    ``row_norms([g])[0][i] == tensor_norms([g[i]])[0]``.

    Args:
        grads: As for :func:`tensor_norms`, each with at least one axis. The rows of a vector are its
            elements.
        ord: As for :func:`tensor_norms`.

    Returns:
        One float64 array per gradient, of shape ``(g.shape[0],)``; of a ``None`` entry, of shape ``(0,)``.
        The norm of a row without elements is 0.

    Raises:
        TypeError: As for :func:`tensor_norms`.
        ValueError: As for :func:`tensor_norms`; a gradient has no axes (``g.reshape(1)`` has one row).

    Example:
        >>> import numpy as np, gradclip
        >>> gradclip.row_norms([np.array([[3.0, 4.0], [0.0, 1.0]]), np.array([-2.0])])
        [array([5., 1.]), array([2.])]
    """
    return read_and_see(grads)[0].row_norms(ord)


def global_norm(grads: GradientArrays, ord: float = 2) -> float:
    """Measure the norm over all gradients together, as if they were one long vector.

    Args:
        grads: As for :func:`tensor_norms`.
        ord: As for :func:`tensor_norms`.

    Returns:
        The norm. It depends neither on the order of ``grads`` nor on threads or machine. An array that is
        given twice counts twice. (:func:`gradclip.torch.get_total_norm` counts a tensor once: there the same
        parameter comes up under several names.) Of arrays on a
        GPU, a 0-d float64 array there.

    Raises:
        TypeError: As for :func:`tensor_norms`.
        ValueError: As for :func:`tensor_norms`.

    Example:
        >>> import numpy as np, gradclip
        >>> gradclip.global_norm({"w": np.array([3.0, 4.0]), "b": np.array([12.0])})
        13.0
    """
    norm: float = read_norms(grads).global_norm(ord)
    return norm


def measure(
    grads: GradientArrays,
    ord: float = 2,
    groups: Grouping = None,
    grad_scale: float = 1.0,
    reduce: Reduce | None = None,
    params: GradientArrays | None = None,
    l2: float = 0.0,
    l1: float = 0.0,
) -> Measured:
    """Measure gradients in one pass, for somebody to decide before they are clipped.

    A threshold that depends on the norms costs nothing more than one that was known: the clip that follows
    does not look at memory again, but to write.

    Args:
        grads: As for :func:`clip_by_global_norm_`. What cannot be written can be measured.
        ord: As for :func:`tensor_norms`.
        groups: As for :func:`clip_by_global_norm_`.
        grad_scale: As for :func:`clip_by_global_norm_`.
        reduce: As for :func:`clip_by_global_norm_`; called here.
        params: As for :func:`clip_by_global_norm_`; what clips or scales afterwards writes it, too.
        l2: As for :func:`clip_by_global_norm_`.
        l1: As for :func:`clip_by_global_norm_`.

    Returns:
        The norms, and the way to clip or scale by them.

    Raises:
        TypeError: As for :func:`clip_by_global_norm_`, of these arguments.
        ValueError: The same.

    Example:
        Clip to the median of the norms seen so far:

        >>> import numpy as np, gradclip
        >>> grads = [np.array([3.0, 4.0]), np.array([12.0])]
        >>> seen = [2.0, 1.0]
        >>> measured = gradclip.measure(grads)
        >>> seen.append(measured.total_norm)
        >>> measured.clip_(np.median(seen)).coefficient == 2 / 13
        True
    """
    regularised = with_params(read_and_see(grads)[0], params, l2, l1)
    return Measured(regularised.measure(ord, groups, grad_scale, reduce))


def clip_by_global_norm_(
    grads: GradientArrays,
    max_norm: Thresholds | Policy,
    ord: float = 2,
    groups: Grouping = None,
    grad_scale: float = 1.0,
    nonfinite: NonFinite = "raise",
    reduce: Reduce | None = None,
    rounding: Rounding = "nearest",
    params: GradientArrays | None = None,
    l2: float = 0.0,
    l1: float = 0.0,
) -> ClipResult:
    """Clip gradients in place so that the norm of every group is at most ``max_norm`` (rounded).

    The gradients of a group are multiplied by ``max_norm / norm`` if ``norm > max_norm`` and left
    alone otherwise: then not one byte is written. All arguments are checked before the first byte is
    written.

    Args:
        grads: As for :func:`tensor_norms`, but writable, and no two entries may share memory.
        max_norm: The threshold, not negative: 0 makes everything 0, ``inf`` measures and never clips.
            Unless ``groups`` is ``None``, also one per group: a sequence, or a mapping by the names of
            the groups; ``None`` leaves a group alone. Of rows, one array of all; or for each gradient a
            number, ``None`` or an array with one per row, in a sequence or in a mapping by the names of the
            gradients. On a GPU also a 0-d array there, or one of shape
            ``(groups,)``: an adaptive threshold waits for nothing. Or a policy: an object whose method
            ``thresholds(measured)`` gets what was measured (a :class:`Measured`) and returns any of these;
            :mod:`gradclip.policies` has those of the literature.
        ord: Which norm, as for :func:`tensor_norms`.
        groups: Gradients that share one norm. ``None``: all of them (global clipping, Pascanu et al.
            2013, arXiv:1211.5063). ``"tensor"``: each its own. ``"row"``: each row of each gradient its own
            (:func:`row_norms`). ``"sample"``: row i of all gradients together is group i, so their first axes
            are alike: per-example gradients (Abadi et al. 2016, arXiv:1607.00133). ``"unit"``: each output
            unit of a layer, a row of a gradient with two axes or more; a vector or a scalar is one unit.
            ``"unit_last"``: the same where units are the last axis, as JAX and TensorFlow lay weights out.
            With all these the norm of a gradient is that over its rows. A label for each entry of ``grads``,
            in a sequence or in a mapping by the names of the gradients: equal labels share a norm. Labels are
            names, numbered in the order in which they first appear, or integers from 0 to ``len(grads) - 1``.
        grad_scale: The gradients hold ``grad_scale * g`` (loss scaling of mixed precision). Norms are
            those of ``g`` and memory becomes ``coefficient * g``: unscaling and clipping in one.
        nonfinite: What to do when a norm is infinite or NaN. ``"raise"``: raise, nothing is written.
            ``"skip"``: leave all gradients as they are. ``"zero"``: set all gradients to zero.
            ``"propagate"``: multiply all the same, as PyTorch does (an infinite norm gives the
            coefficient 0, a NaN norm gives NaN; ``max_norm=inf`` still writes nothing).
        reduce: For gradients spread over processes: called once with this process's float64 sums, one
            per group (of squares; of magnitudes for ``ord=1``; of p-th powers; largest magnitudes for
            ``inf``), returns the sums over all processes in the same shape. What it raises is raised here.
            One that has an attribute ``ord`` (those of :mod:`gradclip.distributed`) is refused under
            another ``ord``.
        rounding: ``"nearest"``: each product is rounded to nearest, so that the norm of what is written may
            be above ``max_norm`` by that much, as with every library. ``"down"``: the exact norm of what
            memory holds afterwards is at most ``max_norm``, which a proof of differential privacy needs. Of
            float32 at most 1e-6 of the norm is given away; 16-bit elements are cut off. See
            ``docs/reduction-order.md``.
        params: The parameters, for weight regularisation in the same pass: arrays as ``grads`` has them (a
            mapping if that is one; ``None`` where that has ``None``), each of the shape of its gradient. They
            are only read. Dtypes may differ (a bfloat16 gradient of a float32 master weight), but not
            complex from real. torch tensors that require grad are fine.
        l2: The factor of L2 regularisation (weight decay as part of the gradient; Krogh and Hertz 1991): what
            is measured, clipped and written is ``g + l2 * w + l1 * sign(w)``, computed in float64 and rounded
            once. It is written also where nothing is clipped.
        l1: The factor of L1 regularisation (Tibshirani 1996), for real dtypes.

    Returns:
        What was measured and done. With ``reduce``, ``total_norm`` and ``group_norms`` are over all
        processes, ``norms`` and ``nonfinite`` of this one. On a GPU its fields are arrays there, and
        only ``nonfinite="raise"`` waits: to see whether it must.

    Raises:
        TypeError: As for :func:`tensor_norms`; any other argument is of the wrong kind; an entry is
            immutable (``jax.Array``).
        ValueError: As for :func:`tensor_norms`; an entry is read-only, overlaps itself or shares memory
            with another; ``max_norm`` is negative or NaN, ``ord`` or ``grad_scale`` not positive;
            ``groups`` does not have one label per entry; a gradient has no axes, or not as many samples as
            another; ``params`` are not as many as ``grads``, or have other shapes or names, or share memory
            with them; ``l2`` or ``l1`` is negative or not finite, or not 0 without ``params``;
            ``nonfinite`` is not one of the four; a tensor was given other memory while ``reduce`` ran.
        NonFiniteGradientError: A gradient holds an infinity or a NaN and ``nonfinite="raise"``.

    Warns:
        UserWarning: There is no gradient: an iterator that was used up, or a clip before ``backward()``.

    Example:
        >>> import numpy as np, gradclip
        >>> grads = {"w": np.array([3.0, 4.0]), "b": np.array([12.0])}
        >>> gradclip.clip_by_global_norm_(grads, max_norm=6.5)
        ClipResult(clipped: total norm 13, coefficient 0.5, 2 gradients
                    12  b
                     5  w)
        >>> grads["w"], grads["b"]
        (array([1.5, 2. ]), array([6.]))
    """
    gradients, has_any = read_and_see(grads)
    formula = formula_of(rounding)
    result = clip(gradients, max_norm, ord, groups, grad_scale, nonfinite, reduce, formula, params, l2, l1)
    if not has_any and reduce is None:  # else other processes may have some
        warn_of_nothing()
    return result


def clip_by_norm_(
    grads: GradientArrays,
    max_norm: Thresholds | Policy,
    ord: float = 2,
    grad_scale: float = 1.0,
    nonfinite: NonFinite = "raise",
    reduce: Reduce | None = None,
    rounding: Rounding = "nearest",
    params: GradientArrays | None = None,
    l2: float = 0.0,
    l1: float = 0.0,
) -> ClipResult:
    """Clip each gradient in place by its own norm: :func:`clip_by_global_norm_` with ``groups="tensor"``.

    Args:
        grads: As for :func:`clip_by_global_norm_`.
        max_norm: As for :func:`clip_by_global_norm_`; of a mapping of gradients, also by their names.
        ord: As for :func:`clip_by_global_norm_`.
        grad_scale: As for :func:`clip_by_global_norm_`.
        nonfinite: As for :func:`clip_by_global_norm_`.
        reduce: As for :func:`clip_by_global_norm_`.
        rounding: As for :func:`clip_by_global_norm_`.
        params: As for :func:`clip_by_global_norm_`.
        l2: As for :func:`clip_by_global_norm_`.
        l1: As for :func:`clip_by_global_norm_`.

    Returns:
        What was measured and done; ``coefficient`` is an array with one entry per gradient.

    Raises:
        TypeError: As for :func:`clip_by_global_norm_`.
        ValueError: As for :func:`clip_by_global_norm_`.
        NonFiniteGradientError: As for :func:`clip_by_global_norm_`.

    Example:
        >>> import numpy as np, gradclip
        >>> grads = [np.array([3.0, 4.0]), np.array([0.5])]
        >>> gradclip.clip_by_norm_(grads, max_norm=1.0).coefficient
        array([0.2, 1. ])
    """
    gradients, has_any = read_and_see(grads)
    formula = formula_of(rounding)
    result = clip(gradients, max_norm, ord, "tensor", grad_scale, nonfinite, reduce, formula, params, l2, l1)
    if not has_any and reduce is None:  # else other processes may have some
        warn_of_nothing()
    return result


def clip_difference_(
    new: GradientArrays,
    base: GradientArrays,
    max_norm: Thresholds | Policy,
    ord: float = 2,
    groups: Grouping = None,
    nonfinite: NonFinite = "raise",
    reduce: Reduce | None = None,
    rounding: Rounding = "nearest",
) -> ClipResult:
    """Clip an update in place: ``new`` becomes ``base + coefficient * (new - base)``.

    So clips federated learning what a client has trained, before it is sent (McMahan et al. 2018,
    arXiv:1710.06963), and anybody the step of an optimizer. One pass measures ``new - base``, one writes, and
    there is no temporary. Where nothing is to be clipped, not one byte is written.

    Args:
        new: What ``base`` has become: arrays as for :func:`clip_by_global_norm_`, which are written.
        base: What the update began from: arrays as ``new`` has them (a mapping if that is one; ``None`` where
            that has ``None``), each of the shape and dtype of its entry there. They are only read.
        max_norm: As for :func:`clip_by_global_norm_`: of the norm of ``new - base``.
        ord: As for :func:`clip_by_global_norm_`.
        groups: As for :func:`clip_by_global_norm_`.
        nonfinite: As for :func:`clip_by_global_norm_`; ``"zero"`` makes the update zero: ``new`` becomes
            ``base``.
        reduce: As for :func:`clip_by_global_norm_`.
        rounding: As for :func:`clip_by_global_norm_`: ``"down"`` holds of the exact difference of what is in
            memory afterwards.

    Returns:
        What was measured of the update and done.

    Raises:
        TypeError: As for :func:`clip_by_global_norm_`; dtypes differ between ``new`` and ``base``.
        ValueError: As for :func:`clip_by_global_norm_` of its ``params``.
        NonFiniteGradientError: As for :func:`clip_by_global_norm_`, of the update.

    Example:
        >>> import numpy as np, gradclip
        >>> base = [np.array([1.0, 1.0])]
        >>> new = [np.array([4.0, 5.0])]
        >>> gradclip.clip_difference_(new, base, max_norm=2.5).total_norm
        5.0
        >>> new
        [array([2.5, 3. ])]
    """
    gradients, has_any = read_and_see(new, is_update=True)
    update = gradients.with_base(base)
    result = clip(update, max_norm, ord, groups, 1.0, nonfinite, reduce, formula_of(rounding))
    if not has_any and reduce is None:
        warn_of_nothing()
    return result


def accumulate_(
    into: GradientArrays,
    grads: GradientArrays,
    scale: SupportsFloat = 1.0,
    reduce: Reduce | None = None,
) -> Measured:
    """Add gradients to accumulators in place, ``into += scale * grads``, and measure these in the same pass.

    For gradients of 16 bits that are summed in float32 on the CPU: over the micro-batches of a step, or where
    the optimizer's state is offloaded (``docs/offload.md``). The sum is read and written anyway, so that its
    norms are nearly free, and a clip by them does not read it again.

    Each element becomes ``into + scale * grad``, in float64, rounded once to the accumulator's dtype: the
    same bits whatever the threads and the instruction set are (``docs/reduction-order.md``). With ``scale`` 1
    that is the sum of the two numbers in the accumulator's dtype, as PyTorch and NumPy have it.

    Args:
        into: The accumulators: arrays on the CPU as for :func:`clip_by_global_norm_`, of dtype float32,
            float64, complex64 or complex128.
        grads: What is added: arrays as ``into`` has them (a mapping if that is one), each of the shape of its
            accumulator, of any dtype that is not wider, but not complex to real. They are only read. Where an
            entry is ``None``, the accumulator stays as it is and is measured all the same.
        scale: What gradients are multiplied by, any finite number: ``1 / micro_batches``, or the reciprocal
            of a loss scale. With 0 nothing is added, whatever ``grads`` holds.
        reduce: As for :func:`clip_by_global_norm_`, of the new accumulators. What it raises comes after the
            gradients have been added.

    Returns:
        What was measured of the new ``into``, as :func:`measure` would, to the last bit, norms, and the way
        to clip or scale by them. Infinities and NaN are no error here: they have been added. ``nonfinite``
        says where they are, and ``clip_`` raises unless told otherwise.

    Raises:
        TypeError: As for :func:`clip_by_global_norm_`; an accumulator has 16 bits, a gradient has a wider
            dtype than its accumulator, or one of them is complex; a gradient stands where ``into`` has
            ``None``.
        ValueError: As for :func:`clip_by_global_norm_`; an array is on a GPU; ``grads`` are not as many as
            ``into``, or have other shapes or names, or share memory with them; ``scale`` is not finite. When
            any of this is raised, nothing has been added.

    Warns:
        UserWarning: There is no gradient.

    Example:
        >>> import numpy as np, gradclip
        >>> total = [np.zeros(2, np.float32), np.zeros(1, np.float32)]
        >>> for micro_batch in range(2):
        ...     grads = [np.array([3.0, 4.0], np.float16), np.array([12.0], np.float16)]
        ...     measured = gradclip.accumulate_(total, grads, scale=1 / 2)
        >>> measured.total_norm
        13.0
        >>> measured.clip_(max_norm=6.5).coefficient
        0.5
        >>> total
        [array([1.5, 2. ], dtype=float32), array([6.], dtype=float32)]
    """
    measured, given = _core.accumulate(into, grads, scale, reduce)
    if given == 0:
        warn_of_nothing(
            "grads: expected gradients to add, got none, so nothing is added (a call before backward()?)"
        )
    return Measured(measured)


def clip_by_value_(grads: GradientArrays, limit: SupportsFloat) -> ClipResult:
    """Clip every element in place into ``[-limit, limit]``.

    Only tiles of 16 KB that hold an element beyond the limit are written. Infinities become the limit,
    NaN stays NaN, and ``nonfinite`` of the result says where they were. The limit is rounded towards
    zero to the dtype of each array, so that no element is beyond it afterwards. (PyTorch rounds it to
    nearest; :func:`gradclip.torch.clip_grad_value_` gives its bits.)

    Args:
        grads: As for :func:`clip_by_global_norm_`, of real dtype.
        limit: Not negative; ``inf`` measures and never clips.

    Returns:
        What was measured and done. The norms are maximum norms (largest magnitudes) before clipping.
        ``coefficient`` is 1: values are not multiplied.

    Raises:
        TypeError: As for :func:`clip_by_global_norm_`; an entry is complex (it has no order).
        ValueError: As for :func:`clip_by_global_norm_`; ``limit`` is negative or NaN.

    Example:
        >>> import numpy as np, gradclip
        >>> grads = [np.array([0.1, -7.0, np.inf])]
        >>> gradclip.clip_by_value_(grads, limit=0.5).nonfinite
        (0,)
        >>> grads
        [array([ 0.1, -0.5,  0.5])]
    """
    gradients, has_any = read_and_see(grads)
    result = gradients.clip_by_value(limit)
    if not has_any:
        warn_of_nothing()
    return result


def scale_(grads: GradientArrays, factor: SupportsFloat) -> None:
    """Multiply every gradient in place by ``factor``. A factor of 1 writes nothing.

    Args:
        grads: As for :func:`clip_by_global_norm_`.
        factor: Any finite number.

    Raises:
        TypeError: As for :func:`clip_by_global_norm_`.
        ValueError: As for :func:`clip_by_global_norm_`; ``factor`` is not finite.

    Example:
        >>> import numpy as np, gradclip
        >>> grads = [np.array([1.0, 2.0])]
        >>> gradclip.scale_(grads, 0.5)
        >>> grads
        [array([0.5, 1. ])]
    """
    gradients, has_any = read_and_see(grads)
    gradients.scale(factor)
    if not has_any:
        warn_of_nothing()


def set_num_threads(n: int) -> None:
    """Set how many threads a call may use, the calling thread included.

    The default is what the process may use: ``GRADCLIP_NUM_THREADS``, else ``OMP_NUM_THREADS``, else
    the number of processors in its affinity mask. Small work stays on the calling thread whatever the
    setting. Results do not depend on it.

    Args:
        n: At least 1.

    Raises:
        TypeError: ``n`` is not an integer.
        ValueError: ``n`` is less than 1 or more than 1024.

    Example:
        >>> import gradclip
        >>> before = gradclip.get_num_threads()
        >>> gradclip.set_num_threads(1)
        >>> gradclip.get_num_threads()
        1
        >>> gradclip.set_num_threads(before)
    """
    _core.set_num_threads(n)


def get_num_threads() -> int:
    """How many threads a call may use, the calling thread included; see :func:`set_num_threads`."""
    return _core.get_num_threads()


def show_config(measure: bool = False) -> None:
    """Print versions, the instruction set, the number of threads and what there is of GPUs.

    Args:
        measure: Also measure this machine's memory bandwidth, with 256 MB allocated: half a second where
            nothing else runs. On a busy machine it takes longer, and says little.
    """
    from gradclip._config import config_lines  # noqa: PLC0415 (only this function needs it)

    for line in config_lines(measure):
        print(line, flush=True)
