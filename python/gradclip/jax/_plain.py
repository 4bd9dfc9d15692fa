"""Measure, decide, apply in plain JAX, for platforms that gradclip has no kernels for: equal to rounding.

Sums are handed on in the shape of the kernels' (``_kernels``), but hold what only this module reads: a
float32 ``value`` and an int32 ``exponent``, the sum being value * 2 ** (exponent * ord).
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gradclip.jax._config import Config

__all__ = ["combine", "decide", "float_of", "measure", "scale"]

_LOWEST = -(1 << 24)  # the exponent of a sum of 0


def float_of(value: Any) -> Any:
    """Floats; those of a concrete number come as the two words of a float64."""
    if value.dtype != jnp.uint32:
        return value
    low, high = value[..., 0], value[..., 1]
    exponent = ((high >> 20) & 0x7FF).astype(jnp.int32)
    mantissa = 1 + (high & 0xFFFFF).astype(jnp.float32) * 2.0**-20 + low.astype(jnp.float32) * 2.0**-52
    finite = jnp.where(exponent == 0, 0.0, jnp.ldexp(mantissa, exponent - 1023))
    return jnp.where(exponent == 0x7FF, jnp.inf, finite)


def measure(leaves: Sequence[Any], ord: float, parts: Sequence[int]) -> Any:
    """The sums of parts, of shape (parts, 6), uint32."""
    return jnp.concatenate([_measure(leaf, ord, count) for leaf, count in zip(leaves, parts, strict=True)])


@functools.partial(jax.jit, static_argnums=(1, 2))
def _measure(leaf: Any, ord: float, count: int) -> Any:
    if leaf.size == 0:
        return _pack(*_scaled(jnp.zeros(abs(count), jnp.float32), jnp.zeros(abs(count), jnp.int32)))
    # Of one part no axis is moved: it may be sharded.
    rows = leaf[None] if count == 1 else leaf.reshape(count, -1) if count > 0 else leaf.reshape(-1, -count).T
    rows = rows.astype(jnp.promote_types(leaf.dtype, jnp.float32))
    axes = tuple(range(1, rows.ndim))
    largest = jnp.abs(rows)
    if jnp.iscomplexobj(rows):  # whose magnitude could overflow
        largest = jnp.maximum(jnp.abs(rows.real), jnp.abs(rows.imag))
    top = jnp.max(largest, axis=axes)
    is_odd = ~jnp.isfinite(top)
    # The power of two and its inverse are normal numbers.
    most = -int(jnp.finfo(largest.dtype).minexp)
    exponent = jnp.where(is_odd | (top == 0), 0, jnp.clip(jnp.frexp(top)[1], -most, most))
    unit = jnp.expand_dims(jnp.ldexp(jnp.ones_like(top), -exponent), axes)
    terms = jnp.abs(rows * unit).astype(jnp.float32)  # at most 4 times the root of 2
    value = jnp.max(terms, axis=axes) if np.isinf(ord) else jnp.sum(terms**ord, axis=axes)
    value = jnp.where(is_odd, top.astype(jnp.float32), value)
    return _pack(*_scaled(value, exponent))


def _scaled(value: Any, exponent: Any) -> tuple[Any, Any]:
    return value, jnp.where(value == 0, _LOWEST, exponent)


def _pack(value: Any, exponent: Any) -> Any:
    zero = jnp.zeros(value.shape, jnp.uint32)
    words = [lax.bitcast_convert_type(x, jnp.uint32) for x in (value, exponent.astype(jnp.int32))]
    return jnp.stack([words[0], zero, words[1], zero, zero, zero], axis=-1)


def _unpack(words: Any) -> tuple[Any, Any]:
    return (
        lax.bitcast_convert_type(words[..., 0], jnp.float32),
        lax.bitcast_convert_type(words[..., 2], jnp.int32),
    )


def combine(shards: Any, ord: float) -> Any:
    """The sums of shards, of shape (..., shards, parts, 6), together: of shape (..., parts, 6)."""
    value, exponent = _unpack(shards)
    exponent = jnp.where(value == 0, _LOWEST, exponent)  # neutral ones are all 0
    top = jnp.max(exponent, axis=-2)
    return _pack(*_scaled(_total(value, exponent - top[..., None, :], ord, -2), top))


def _total(value: Any, below: Any, ord: float, axis: int) -> Any:
    # 2 ** below, in two steps: one of them may be beyond float32.
    factor = jnp.exp2(jnp.maximum(below, -300).astype(jnp.float32) * (1.0 if np.isinf(ord) else ord))
    terms = jnp.where(value == 0, 0.0, value * factor)
    return jnp.max(terms, axis=axis) if np.isinf(ord) else jnp.sum(terms, axis=axis)


def _group_norms(value: Any, exponent: Any, labels: Any, count: int, config: Config) -> Any:
    """The norms of groups of parts, given by their labels, which are static."""
    label = np.asarray(labels)
    top = jax.ops.segment_max(exponent, label, count)
    top = jnp.where(top < _LOWEST, _LOWEST, top)
    below = jnp.maximum(exponent - top[label], -300).astype(jnp.float32)
    terms = jnp.where(value == 0, 0.0, value * jnp.exp2(below * (1.0 if config.is_max else config.ord)))
    if config.is_max:
        root = jnp.maximum(jax.ops.segment_max(terms, label, count), 0.0)
        root = jnp.where(jax.ops.segment_max(jnp.isnan(terms) * 1, label, count) > 0, jnp.nan, root)
    else:
        root = jax.ops.segment_sum(terms, label, count) ** (1 / config.ord)
    # In two steps: the power itself may be beyond float32.
    half = top // 2
    return jnp.where(root == 0, 0.0, jnp.ldexp(jnp.ldexp(root, half), top - half))


def decide(words: Any, limits: Any, grad_scale: Any, config: Config) -> tuple[Any, ...]:
    """As the kernel ``decide``; leading axes are decisions of their own."""
    one = functools.partial(_decide, config=config)
    for _ in range(words.ndim - 2):
        one = jax.vmap(one)
    return one(words, float_of(limits), float_of(grad_scale))


def _decide(words: Any, limits: Any, grad_scale: Any, config: Config) -> tuple[Any, ...]:
    value, exponent = _unpack(words)
    of_part = np.repeat(np.arange(config.num_tensors), np.abs(config.parts))
    scale = grad_scale.astype(jnp.float32)

    def norms_of(labels: Any, count: int) -> Any:
        return _group_norms(value, exponent, labels, count, config) / scale

    norms = norms_of(of_part, config.num_tensors)
    total = norms_of(np.zeros_like(of_part), 1)[0]
    group_norms = norms_of(config.group_of_part, config.num_groups)
    odd = jnp.zeros(config.num_tensors, bool).at[of_part].max(~jnp.isfinite(value))
    is_odd = jnp.any(odd) | ~jnp.all(jnp.isfinite(group_norms))

    limits = limits.astype(jnp.float32)
    bound = group_norms * (1 + 2.0**-20) if config.down else group_norms
    clips = (limits < jnp.inf) & ~(bound <= limits)
    coefficients = jnp.where(clips, limits / bound, 1.0)
    coefficients = jnp.where(clips & jnp.isnan(group_norms), jnp.nan, coefficients)
    coefficients = jnp.where(limits >= 0, coefficients, jnp.nan)  # a threshold that is none
    if config.are_coefficients:
        coefficients = jnp.broadcast_to(limits, group_norms.shape)
    is_zero = jnp.zeros((), bool)
    leaves_alone = jnp.zeros((), bool)
    if config.nonfinite == "zero":
        coefficients = jnp.where(is_odd, 0.0, coefficients)
        is_zero = is_odd
    elif config.nonfinite == "skip":
        coefficients = jnp.where(is_odd, 1.0, coefficients)
        leaves_alone = is_odd
    factor = jnp.where(leaves_alone, 1.0, coefficients / scale)[np.asarray(config.group_of_part)]
    flag = jnp.broadcast_to(is_zero, factor.shape).astype(jnp.uint32)
    factors = jnp.stack([lax.bitcast_convert_type(factor.astype(jnp.float32), jnp.uint32), flag], axis=-1)
    clipped = jnp.any(coefficients != 1)
    result = [x.astype(jnp.result_type(float)) for x in (total, norms, group_norms, coefficients)]
    return (factors, *result, clipped, odd)


def scale(factors: Any, leaves: Sequence[Any], parts: Sequence[int], down: bool) -> list[Any]:
    """Each part of the leaves times its factor."""
    scaled, at = [], 0
    for leaf, count in zip(leaves, parts, strict=True):
        scaled.append(_scale(factors[at : at + abs(count)], leaf, count, down))
        at += abs(count)
    return scaled


@functools.partial(jax.jit, static_argnums=(2, 3))
def _scale(factors: Any, leaf: Any, count: int, down: bool) -> Any:
    if leaf.size == 0:
        return leaf
    factor = lax.bitcast_convert_type(factors[:, 0], jnp.float32)
    is_zero = factors[:, 1] == 1
    if count != 1:
        columns = leaf.reshape(-1, -count) if count < 0 else leaf.reshape(count, -1)
        factor, is_zero = (x if count < 0 else x[:, None] for x in (factor, is_zero))
    else:
        columns, factor, is_zero = leaf, factor[0], is_zero[0]
    exact = columns * factor.astype(jnp.promote_types(leaf.real.dtype, jnp.float32))
    new = exact.astype(leaf.dtype)
    if down and leaf.dtype.itemsize == 2:  # of the others the coefficient has room
        new = jnp.where(jnp.abs(new) > jnp.abs(exact), jnp.nextafter(new, jnp.zeros_like(new)), new)
    new = jnp.where(factor == 1, columns, new)
    return jnp.where(is_zero, jnp.zeros_like(new), new).reshape(leaf.shape)
