"""Any layout: gaps, any order of axes, negative strides, no axis at all; bytes in gaps stay."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import gradclip
from exact import scaled
from matrices import DTYPES, LAYOUTS, NAMES, ORDS, REAL_NAMES, TOLERANCE, Array, lay_out, values

_SHAPES = [(3, 5, 7), (1, 1, 1), (1, 300, 1), (2, 1, 700), (40, 37, 50)]


def _same(left: Array, right: Array) -> bool:
    return left.tobytes() == right.tobytes()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", NAMES)
def test_norms(name: str, layout: str) -> None:
    for shape in _SHAPES:
        original = values(name, shape, seed=1)
        view, _ = lay_out(layout, original)
        for ord in ORDS[:4]:
            plain = gradclip.tensor_norms([original], ord)[0]  # which test_norms_right.py looks after
            assert gradclip.tensor_norms([view], ord)[0] == pytest.approx(plain, rel=TOLERANCE[name], abs=0)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", NAMES)
def test_clip(name: str, layout: str) -> None:
    for shape in _SHAPES:
        original = values(name, shape, seed=2)
        view, buffer = lay_out(layout, original)
        before = buffer.tobytes()
        result = gradclip.clip_by_global_norm_([view], 0.01)
        assert isinstance(result.coefficient, float)
        assert 0 < result.coefficient < 1
        assert _same(view, scaled(original, result.coefficient)), shape
        view[...] = original
        assert buffer.tobytes() == before, f"{shape}: bytes outside the array were written"


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", NAMES)
def test_scale_and_set_to_zero(name: str, layout: str) -> None:
    original = values(name, (12, 17, 40), seed=3)
    view, buffer = lay_out(layout, original)
    before = buffer.tobytes()
    gradclip.scale_([view], -0.75)
    assert _same(view, scaled(original, -0.75))
    view[5, 3, 1] = np.nan
    assert gradclip.clip_by_global_norm_([view], 1.0, nonfinite="zero").coefficient == 0.0
    assert _same(view, np.zeros_like(original)), "zero means +0 in every element"
    view[...] = original
    assert buffer.tobytes() == before, "bytes outside the array were written"


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", REAL_NAMES)
def test_value_clip(name: str, layout: str) -> None:
    original = values(name, (12, 17, 40), seed=4)
    view, buffer = lay_out(layout, original)
    before = buffer.tobytes()
    assert gradclip.clip_by_value_([view], 0.5).clipped
    assert (view.astype(np.float64) == np.clip(original.astype(np.float64), -0.5, 0.5)).all()
    view[...] = original
    assert buffer.tobytes() == before, "bytes outside the array were written"


@pytest.mark.parametrize("name", NAMES)
def test_dense_layouts_have_the_norm_of_their_memory(name: str) -> None:
    """A transposed array is read as it lies: the norm is that of the same bytes in C order."""
    base = values(name, (30, 41, 7), seed=5)
    flat = gradclip.global_norm([base.reshape(-1)])
    for axes in ((0, 1, 2), (2, 1, 0), (1, 2, 0), (0, 2, 1), (2, 0, 1), (1, 0, 2)):
        view = base.transpose(axes)
        assert gradclip.global_norm([view]) == flat
        assert gradclip.global_norm([view[::-1, :, ::-1]]) == flat
        assert gradclip.global_norm([view.copy(order="K")]) == flat


@pytest.mark.parametrize("name", NAMES)
def test_scalars_empty_arrays_and_axes_of_length_1(name: str) -> None:
    dtype = DTYPES[name]
    scalar = np.array(8.0, dtype)
    empty = [np.zeros(shape, dtype) for shape in ((0,), (3, 0), (0, 4, 2))]
    wild = np.lib.stride_tricks.as_strided(np.full(6, 2.0, dtype), (1, 6, 1), (-7, dtype.itemsize, 12345))
    result = gradclip.clip_by_norm_([scalar, *empty, wild], 4.0)
    assert result.norms.tolist()[:4] == [8.0, 0.0, 0.0, 0.0]
    assert result.norms[4] == pytest.approx(24**0.5, rel=1e-7)
    assert scalar == 4.0
    assert np.allclose(np.abs(wild.astype(np.complex128)), 4.0 / 6**0.5, rtol=1e-2)
    broadcast = np.broadcast_to(np.array(3.0, dtype), (4, 4))
    assert gradclip.tensor_norms([broadcast]).tolist() == [12.0]
    # Stride 0 over nothing or over one element is no overlap.
    gradclip.scale_([np.lib.stride_tricks.as_strided(np.zeros(1, dtype), (0, 9), (0, 0))], 2.0)
    gradclip.scale_([np.lib.stride_tricks.as_strided(np.zeros(1, dtype), (1, 1), (0, 0))], 2.0)


def test_32_axes() -> None:
    original = values("float32", 2**16, seed=6).reshape((2,) * 16 + (1,) * 16)
    view = original.transpose(np.random.default_rng(7).permutation(32))
    expected = scaled(view, 0.5)
    gradclip.scale_([view], 0.5)
    assert (view == expected).all()


def test_sliced_along_every_axis() -> None:
    buffer = values("float32", 2 * 4 * 6 * 8 * 10, seed=8).reshape(2 * 2, 4, 6, 4, 10)
    view = buffer[::2, ::-2, 1::3, ::-1, 9:0:-4]
    rest = buffer.copy()
    rest[::2, ::-2, 1::3, ::-1, 9:0:-4] *= np.float32(0.25)
    gradclip.scale_([view], 0.25)
    assert _same(buffer, rest)


def test_memory_map_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "gradients.bin"
    np.arange(1.0, 5001.0, dtype=np.float32).tofile(path)
    mapped = np.memmap(path, np.float32, "r+")
    gradclip.scale_([mapped], 2.0)
    mapped.flush()
    assert (np.fromfile(path, np.float32) == 2 * np.arange(1.0, 5001.0)).all()
    with pytest.raises(ValueError, match="read-only"):
        gradclip.scale_([np.memmap(path, np.float32, "r")], 2.0)
