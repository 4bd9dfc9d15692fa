"""Clipping as transformations of optax, whose states hold what was measured and done."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gradclip.jax import _kernels, _policies
from gradclip.jax._config import Config
from gradclip.jax._functions import (
    ClipResult,
    clip_leaves,
    clip_measured,
    measure_leaves,
)
from gradclip.jax._tree import Leaves, leaf_names, make_config, read, read_limits

__all__ = [
    "ClipState",
    "adaptive_grad_clip",
    "clip_by_block_rms",
    "clip_by_global_norm",
    "clip_by_norm",
    "clip_by_value",
    "clip_elements",
    "per_example_global_norm_clip",
]


class ClipState(NamedTuple):
    """The state of a transformation that clips: of its last update, for logs that need no second pass.

    Floats are float32, or float64 where JAX has that enabled.

    Attributes:
        steps: How many updates there were; int32, of shape ().
        clipped_steps: In how many something was clipped; int32, of shape ().
        total_norm: The norm of all gradients together, before clipping; of shape ().
        norms: The norm of each gradient, of shape (leaves,); :func:`named_norms` gives them names.
        group_norms: The norm of each group, of shape (groups,).
        coefficient: What was clipped has been multiplied by: of shape (), or with groups (groups,).
        nonfinite: Which gradients held a NaN or infinity; bool, of shape (leaves,).
        policy: The state of the policy, if there is one.
    """

    steps: Any
    clipped_steps: Any
    total_norm: Any
    norms: Any
    group_norms: Any
    coefficient: Any
    nonfinite: Any
    policy: Any = ()


def _transformation(init: Callable[..., Any], update: Callable[..., Any]) -> Any:
    try:
        import optax  # noqa: PLC0415 (the functions of gradclip.jax need none)
    except ImportError as error:
        raise ImportError(
            "gradclip.jax: expected optax, whose transformations these are: pip install optax"
        ) from error
    return optax.GradientTransformationExtraArgs(init, update)


def _empty_state(config: Config, policy: Any = ()) -> ClipState:
    kind = jnp.result_type(float)
    return ClipState(
        steps=jnp.zeros((), jnp.int32),
        clipped_steps=jnp.zeros((), jnp.int32),
        total_norm=jnp.zeros((), kind),
        norms=jnp.zeros(config.num_tensors, kind),
        group_norms=jnp.zeros(config.num_groups, kind),
        coefficient=jnp.ones(() if config.groups == "all" else config.num_groups, kind),
        nonfinite=jnp.zeros(config.num_tensors, bool),
        policy=policy,
    )


def _next_state(state: ClipState, result: ClipResult, policy: Any = ()) -> ClipState:
    return ClipState(
        steps=state.steps + 1,
        clipped_steps=state.clipped_steps + result.clipped,
        total_norm=result.total_norm,
        norms=result.norms,
        group_norms=result.group_norms,
        coefficient=result.coefficient,
        nonfinite=result.nonfinite,
        policy=policy,
    )


def _check_state(state: Any, config: Config) -> None:
    if not isinstance(state, ClipState):
        raise TypeError(f"state: expected a ClipState, from init, got {type(state).__name__}")
    seen, groups = np.shape(state.norms), np.shape(state.group_norms)
    if seen != (config.num_tensors,) or groups != (config.num_groups,):
        raise ValueError(
            f"state: expected one for {config.num_tensors} gradients in {config.num_groups} groups, as the "
            f"updates have, got one for {math.prod(seen)} in {math.prod(groups)} (init was given other "
            f"parameters)"
        )


def _check_policy_state(state: ClipState, expected: Any, max_norm: Any) -> None:
    def kinds(state: Any) -> Any:
        return jax.tree.structure(state), [(np.shape(leaf), leaf.dtype) for leaf in jax.tree.leaves(state)]

    if kinds(state.policy) != kinds(expected):
        raise ValueError(f"state: expected that of max_norm={max_norm!r}, got that of another policy or none")


def clip_by_global_norm(
    max_norm: Any,
    *,
    ord: Any = None,
    groups: Any = None,
    grad_scale: Any = 1.0,
    nonfinite: str = "propagate",
    rounding: str = "nearest",
    axis_name: Any = None,
) -> Any:
    """Clip updates by their global norm, or by that of groups: in place of ``optax.clip_by_global_norm``.

    The updates that leave have the bits of :func:`gradclip.clip_by_global_norm_`. Where none is clipped
    nothing is written.

    Args:
        max_norm: As of :func:`gradclip.jax.clip`; or a schedule, a callable from the number of updates so far
            to that; or a policy of :mod:`gradclip.policies`, whose state becomes part of this one's.
            ``optax.inject_hyperparams`` may make it a part of the state.
        ord: As of :func:`gradclip.jax.clip`; None is 2.
        groups: As of :func:`gradclip.jax.clip`; None is all together, or what a policy is made for.
        grad_scale: As of :func:`gradclip.jax.clip`.
        nonfinite: As of :func:`gradclip.jax.clip`. With ``"skip"`` updates pass as they are; look at the
            state's ``nonfinite`` to leave a step out (or use ``optax.apply_if_finite``).
        rounding: As of :func:`gradclip.jax.clip`.
        axis_name: As of :func:`gradclip.jax.clip`.

    Returns:
        An ``optax.GradientTransformationExtraArgs`` with a :class:`ClipState`. Policies that look at the loss
        (:class:`gradclip.policies.SkipStep`) find it as ``value=`` of ``update``.

    Raises:
        TypeError, ValueError: While it is traced, as :func:`gradclip.jax.clip` does, and for a state that was
            made for other parameters.

    Example:
        >>> import jax.numpy as jnp, optax, gradclip.jax
        >>> optimizer = optax.chain(gradclip.jax.clip_by_global_norm(1.0), optax.sgd(0.1))
        >>> params = {"w": jnp.array([3.0, 4.0])}
        >>> state = optimizer.init(params)
        >>> updates, state = optimizer.update({"w": jnp.array([30.0, 40.0])}, state, params)
        >>> updates["w"], state[0].total_norm, state[0].clipped_steps
        (Array([-0.06, -0.08], dtype=float32), Array(50., dtype=float32), Array(1, dtype=int32))
    """
    is_policy = _policies.is_policy(max_norm)
    if is_policy:
        _policies.check(max_norm, rounding)

    def configured(leaves: Leaves) -> tuple[Config, Any]:
        chosen = groups
        if chosen is None and is_policy:
            chosen = getattr(max_norm, "groups", None)
            if callable(chosen):  # of names
                labels = chosen(leaf_names(leaves.tree))
                chosen = leaves.rebuilt(list(labels))
        return make_config(
            leaves,
            ord=2 if ord is None else ord,
            groups=chosen,
            nonfinite=nonfinite,
            rounding=rounding,
            axis_name=axis_name,
        )

    def initial_policy_state(config: Config, leaves: Leaves) -> Any:
        if not is_policy:
            return ()
        return _policies.initial_state(max_norm, _view(_empty_state(config), config, leaves))

    def init(params: Any) -> ClipState:
        leaves = read(params, "params")
        config, _ = configured(leaves)
        return _empty_state(config, initial_policy_state(config, leaves))

    def update(updates: Any, state: ClipState, params: Any = None, **extra: Any) -> tuple[Any, ClipState]:
        leaves = read(updates, "updates")
        config, names = configured(leaves)
        _check_state(state, config)
        _check_policy_state(state, initial_policy_state(config, leaves), max_norm)
        if not is_policy:
            limits = max_norm(state.steps) if callable(max_norm) else max_norm
            clipped, result = clip_leaves(config, names, leaves, limits, grad_scale)
            return leaves.rebuilt(clipped), _next_state(state, result)
        policy = _policies.with_state(max_norm, state.policy)
        if hasattr(policy, "with_loss") and extra.get("value") is not None:
            policy.with_loss(extra["value"])
        measured = measure_leaves(config, names, leaves, grad_scale)
        view = _view(measured, config, leaves)
        if hasattr(policy, "coefficients"):
            config = dataclasses.replace(config, are_coefficients=True)
            clipped, result = clip_measured(measured, leaves, policy.coefficients(view), config)
        else:
            clipped, result = clip_measured(measured, leaves, policy.thresholds(view))
        done = _view(result, config, leaves, coefficient=result.coefficient)
        return leaves.rebuilt(clipped), _next_state(
            state, result, _policies.learn(policy, done, state.policy)
        )

    return _transformation(init, update)


def _view(measured: Any, config: Config, leaves: Leaves, **more: Any) -> SimpleNamespace:
    """What policies look at of what was measured, or done."""
    sizes = np.zeros(config.num_groups, np.int64)
    of_parts = [array.size // max(abs(n), 1) for array, n in zip(leaves.arrays, config.parts, strict=True)]
    np.add.at(sizes, np.asarray(config.group_of_part), np.repeat(of_parts, np.abs(config.parts)))
    return SimpleNamespace(
        total_norm=measured.total_norm,
        norms=measured.norms,
        group_norms=measured.group_norms,
        is_global=config.groups == "all",
        group_sizes=sizes,
        names=leaf_names(leaves.tree),
        missing=(),
        **more,
    )


def clip_by_norm(max_norm: Any, **options: Any) -> Any:
    """Clip each array of the updates by its own norm, to ``max_norm``.

    Args:
        max_norm: One for all, or one for each array, in the order of ``jax.tree.leaves``; or as of
            :func:`clip_by_global_norm`.
        options: As of :func:`clip_by_global_norm`, but for ``groups``.

    Returns:
        As :func:`clip_by_global_norm`.

    Example:
        >>> import jax.numpy as jnp, gradclip.jax
        >>> transformation = gradclip.jax.clip_by_norm(1.0)
        >>> grads = [jnp.array([3.0, 4.0]), jnp.array([0.5])]
        >>> transformation.update(grads, transformation.init(grads))[0]
        [Array([0.6, 0.8], dtype=float32), Array([0.5], dtype=float32)]
    """
    return clip_by_global_norm(max_norm, groups="tensor", **options)


def clip_by_block_rms(threshold: Any) -> Any:
    """Clip each array of the updates to a root mean square of at most ``threshold``.

    In place of ``optax.clip_by_block_rms`` (Shazeer and Stern 2018, arXiv:1804.04235, of Adafactor's
    updates).

    Args:
        threshold: A number, or an array of shape (), traced or not.

    Returns:
        As :func:`clip_by_global_norm`; the norms of the state are norms, not root mean squares.

    Example:
        >>> import jax.numpy as jnp, gradclip.jax
        >>> transformation = gradclip.jax.clip_by_block_rms(1.0)
        >>> grads = [jnp.array([3.0, 3.0])]
        >>> transformation.update(grads, transformation.init(grads))[0]
        [Array([1., 1.], dtype=float32)]
    """

    def init(params: Any) -> ClipState:
        return _empty_state(make_config(read(params, "params"), groups="tensor")[0])

    def update(updates: Any, state: ClipState, params: Any = None, **extra: Any) -> tuple[Any, ClipState]:
        leaves = read(updates, "updates")
        roots = np.sqrt([array.size for array in leaves.arrays])
        config, _ = make_config(leaves, groups="tensor")
        _check_state(state, config)
        clipped, result = clip_leaves(config, None, leaves, roots * _number(threshold, "threshold"))
        return leaves.rebuilt(clipped), _next_state(state, result)

    return _transformation(init, update)


def clip_by_value(limit: Any) -> Any:
    """Clip each element of the updates into [-limit, limit]: in place of ``optax.clip``.

    NaN stays. The limit is rounded towards zero to the dtype of each array.

    Args:
        limit: A number or an array of shape (), traced or not.

    Returns:
        As :func:`clip_by_global_norm`; the norms of the state are the largest magnitudes, and coefficients
        are 1.

    Raises:
        TypeError: While it is traced, for a complex array, which is named by its path.

    Example:
        >>> import jax.numpy as jnp, gradclip.jax
        >>> transformation = gradclip.jax.clip_by_value(1.0)
        >>> grads = [jnp.array([-3.0, 0.5])]
        >>> transformation.update(grads, transformation.init(grads))[0]
        [Array([-1. ,  0.5], dtype=float32)]
    """

    def init(params: Any) -> ClipState:
        return _empty_state(make_config(read(params, "params"), ord=math.inf)[0])

    def update(updates: Any, state: ClipState, params: Any = None, **extra: Any) -> tuple[Any, ClipState]:
        leaves = read(updates, "updates")
        config, _ = make_config(leaves, ord=math.inf)
        _check_state(state, config)
        bound = _number(limit, "limit")
        clipped = clip_elements(leaves, bound)
        measured = measure_leaves(config, None, leaves, 1.0)
        result = ClipResult(
            total_norm=measured.total_norm,
            norms=measured.norms,
            group_norms=measured.group_norms,
            coefficient=jnp.ones((), measured.total_norm.dtype),
            clipped=jnp.any(
                jnp.stack([jnp.any(jnp.abs(a) > _rounded_down(bound, a.dtype)) for a in leaves.arrays])
            ),
            nonfinite=measured.nonfinite,
        )
        return leaves.rebuilt(clipped), _next_state(state, result)

    return _transformation(init, update)


def _number(value: Any, argument: str) -> Any:
    """One that is not negative, or an array of it, which may be traced."""
    read_limits(value, Config(parts=(1,)), None, argument)
    return value.reshape(()) if isinstance(value, (jax.Array, np.ndarray)) else value


def _rounded_down(limit: Any, dtype: Any) -> Any:
    if not isinstance(limit, jax.Array):
        number = np.asarray(limit, np.float64)
        rounded = number.astype(dtype)
        return np.nextafter(rounded, rounded.dtype.type(0)) if rounded > number else rounded
    exact = limit.astype(jnp.promote_types(dtype, jnp.float32))
    near = exact.astype(dtype)
    return jnp.where(near.astype(exact.dtype) > exact, jnp.nextafter(near, jnp.zeros_like(near)), near)


def clip_elements(leaves: Leaves, limit: Any) -> list[Any]:
    """Clip each element of what has been read into [-limit, limit]."""
    for i, array in enumerate(leaves.arrays):
        if jnp.iscomplexobj(array):
            raise TypeError(
                f"{leaves.path(i)}: expected real floats to clip by value, got {array.dtype.name}"
            )
    bounds = [_rounded_down(limit, array.dtype) for array in leaves.arrays]
    return [
        jnp.where(jnp.abs(array) > bound, jnp.copysign(bound, array), array)
        for array, bound in zip(leaves.arrays, bounds, strict=True)
    ]


def adaptive_grad_clip(clipping: Any, eps: Any = 1e-3, axis: Any = None) -> Any:
    """Clip each unit of the updates to ``clipping`` times the norm of that unit of the parameters.

    In place of ``optax.adaptive_grad_clip`` (Brock et al. 2021, arXiv:2102.06171). The threshold of a unit is
    ``clipping * max(norm of the parameter's unit, eps)``.

    Args:
        clipping: A number, or an array of shape (), traced or not.
        eps: So that what begins as zero can move. As ``clipping``.
        axis: The axis or axes that a unit goes along. None, as in optax: scalars and vectors are one unit; of
            two and three axes the first, of four the first three, of five the first four.

    Returns:
        As :func:`clip_by_global_norm`; its ``update`` needs the parameters, and groups are units, array by
        array.

    Raises:
        ValueError: While it is traced: without parameters, for parameters of other shapes, for an axis that
            an array does not have, or an array of more than five axes without ``axis``.

    Example:
        >>> import jax.numpy as jnp, gradclip.jax
        >>> transformation = gradclip.jax.adaptive_grad_clip(0.01)
        >>> params, grads = [jnp.array([[3.0, 0.0], [4.0, 0.0]])], [jnp.ones((2, 2))]
        >>> updates, state = transformation.update(grads, transformation.init(params), params)
        >>> [f"{norm:.3g}" for norm in jnp.linalg.norm(updates[0], axis=0)]
        ['0.05', '1e-05']
    """

    def arranged(leaves: Leaves) -> tuple[Config, list[tuple[int, ...] | None]]:
        units = [_units(leaves, i, axis) for i in range(len(leaves.arrays))]
        return Config(parts=tuple(parts for parts, _ in units), groups="row"), [order for _, order in units]

    def init(params: Any) -> ClipState:
        return _empty_state(arranged(read(params, "params"))[0])

    def update(updates: Any, state: ClipState, params: Any = None, **extra: Any) -> tuple[Any, ClipState]:
        if params is None:
            raise ValueError("params: expected the parameters, which adaptive_grad_clip measures, got None")
        leaves, beside = read(updates, "updates"), read(params, "params")
        if leaves.treedef != beside.treedef:
            raise ValueError(
                f"params: expected the structure of the updates, {leaves.treedef}, got {beside.treedef}"
            )
        for i, (array, param) in enumerate(zip(leaves.arrays, beside.arrays, strict=True)):
            if array.shape != param.shape:
                raise ValueError(
                    f"{beside.path(i)}: expected the shape of its update, {array.shape}, got {param.shape}"
                )
        config, orders = arranged(leaves)
        _check_state(state, config)

        def turned(arrays: Any) -> tuple[Any, ...]:
            return tuple(
                array if order is None else array.transpose(order)
                for array, order in zip(arrays, orders, strict=True)
            )

        norms = measure_leaves(config, None, beside.with_arrays(turned(beside.arrays)), 1.0).group_norms
        limits = _number(clipping, "clipping") * jnp.maximum(norms, _number(eps, "eps"))
        clipped, result = clip_leaves(config, None, leaves.with_arrays(turned(leaves.arrays)), limits)
        back = [
            array if order is None else array.transpose(np.argsort(order))
            for array, order in zip(clipped, orders, strict=True)
        ]
        return leaves.rebuilt(back), _next_state(state, result)

    return _transformation(init, update)


def _units(leaves: Leaves, index: int, axis: Any) -> tuple[int, tuple[int, ...] | None]:
    """The parts of an array (see ``Config``), and the order of its axes in which they are columns, if not
    theirs."""
    array = leaves.arrays[index]
    shape, ndim = array.shape, array.ndim
    if axis is None:
        if sum(size != 1 for size in shape) <= 1:
            return 1, None
        if ndim > 5:
            raise ValueError(
                f"{leaves.path(index)}: expected at most 5 axes, or axis=, to know its units, got shape "
                f"{shape}"
            )
        along = tuple(range({2: 1, 3: 1, 4: 3, 5: 4}[ndim]))
    else:
        axes = (int(axis),) if np.ndim(axis) == 0 else tuple(map(int, axis))
        if any(not -ndim <= a < ndim for a in axes):
            raise ValueError(f"{leaves.path(index)}: expected to have axis {axis}, got shape {shape}")
        along = tuple(sorted({a % ndim for a in axes}))
    others = tuple(a for a in range(ndim) if a not in along)
    count = math.prod(shape[a] for a in others)
    if along == tuple(range(ndim)):
        return 1, None
    if others == tuple(range(len(others))):
        return count, None
    if along == tuple(range(len(along))):
        return (-count if count > 1 else 1), None
    return count, others + along


def per_example_global_norm_clip(grads: Any, l2_norm_clip: Any) -> tuple[Any, Any]:
    """Clip each example by its global norm and add them up: in place of
    ``optax.per_example_global_norm_clip``.

    Gradients are read twice and not written (Abadi et al. 2016, arXiv:1607.00133).

    Args:
        grads: A pytree of arrays of real or complex floats, whose first axis is that of the examples.
        l2_norm_clip: The highest norm of an example: a number, or an array of shape () or (examples,).

    Returns:
        The sum of the clipped gradients, a pytree of arrays without the first axis, and how many examples
        were clipped, int32, of shape ().

    Raises:
        TypeError: For a leaf that is no array of floats; it is named by its path.
        ValueError: For one with another number of examples.

    Example:
        >>> import jax.numpy as jnp, gradclip.jax
        >>> grads = [jnp.array([[0.0, 3.0, 4.0], [0.0, 0.0, 0.5]])]
        >>> gradclip.jax.per_example_global_norm_clip(grads, 1.0)
        ([Array([0. , 0.6, 1.3], dtype=float32)], Array(1, dtype=int32))
    """
    leaves = read(grads)
    config, names = make_config(leaves, groups="sample")
    limits = read_limits(l2_norm_clip, config, names, "l2_norm_clip")
    sums = _kernels.measure(leaves.arrays, config.ord, config.parts)
    one = np.array([1.0]).view(np.uint32)
    coefficients = _kernels.decide(sums, limits, one, config)[4]
    total = [
        jnp.tensordot(coefficients.astype(jnp.promote_types(array.dtype, jnp.float32)), array, axes=1).astype(
            array.dtype
        )
        for array in leaves.arrays
    ]
    return leaves.rebuilt(total), jnp.sum(coefficients < 1, dtype=jnp.int32)
