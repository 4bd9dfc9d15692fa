"""Arrays of other libraries through DLPack: torch in place, jax for norms, anything else by protocol."""

from __future__ import annotations

import gc
import math
import sys
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate

import gradclip
from exact import scaled
from matrices import DTYPES, NAMES, ORDS, Array, values

TORCH = {name: getattr(torch, name) for name in NAMES}


def to_torch(array: Array) -> torch.Tensor:
    """A tensor of the same bits; torch cannot read NumPy's bfloat16."""
    if array.dtype == DTYPES["bfloat16"]:
        return torch.from_numpy(array.view(np.int16).copy()).view(torch.bfloat16)
    return torch.from_numpy(array.copy())


def torch_bytes(tensor: torch.Tensor) -> bytes:
    raw: Array = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
    return raw.tobytes()


@pytest.mark.parametrize("ord", ORDS)
@pytest.mark.parametrize("name", NAMES)
def test_torch_norms_are_those_of_numpy(name: str, ord: float) -> None:
    arrays = [values(name, n, seed=n) for n in (1, 130, 9001)]
    tensors = [to_torch(array) for array in arrays]
    assert tensors[0].dtype == TORCH[name]
    assert gradclip.tensor_norms(tensors, ord).tobytes() == gradclip.tensor_norms(arrays, ord).tobytes()
    assert gradclip.global_norm(tensors, ord) == gradclip.global_norm(arrays, ord)


@pytest.mark.parametrize("name", NAMES)
def test_torch_in_place(name: str) -> None:
    arrays = [values(name, n, seed=n) for n in (1, 130, 9001)]
    tensors = [to_torch(array) for array in arrays]
    addresses = [tensor.data_ptr() for tensor in tensors]
    result = gradclip.clip_by_global_norm_(tensors, 0.5)
    for tensor, array, address in zip(tensors, arrays, addresses, strict=True):
        assert tensor.data_ptr() == address
        assert torch_bytes(tensor) == scaled(array, float(result.coefficient)).tobytes()


def _torch_layouts() -> dict[str, torch.Tensor]:
    def cube() -> torch.Tensor:
        return torch.arange(1.0, 2 * 3 * 8 * 10 + 1).reshape(2, 3, 8, 10)

    return {
        "contiguous": cube(),
        "channels_last": cube().to(memory_format=torch.channels_last),
        "transposed": cube().transpose(1, 3),
        "strided": cube()[:, :, ::2, 1::3],
        "narrowed": cube().narrow(2, 3, 4),
        "0-d": torch.tensor(7.0),
        "empty": torch.zeros(0, 3),
        "detached": cube().requires_grad_().detach(),
        "no_grad parameter": torch.nn.Parameter(cube(), requires_grad=False),
    }


@pytest.mark.parametrize("layout", _torch_layouts())
def test_torch_layouts(layout: str) -> None:
    tensor = _torch_layouts()[layout]
    expected = tensor.detach().clone() * 0.5
    norm = float(torch.linalg.vector_norm(tensor.detach().double()))
    assert gradclip.global_norm([tensor]) == pytest.approx(norm, rel=1e-7)
    gradclip.scale_([tensor], 0.5)
    assert torch.equal(tensor.detach(), expected)


def test_torch_gradients_of_a_model() -> None:
    """What people have: p.grad of parameters, some of them None."""
    torch.manual_seed(1)
    model = torch.nn.Sequential(torch.nn.Linear(30, 50), torch.nn.Tanh(), torch.nn.Linear(50, 10))
    model[0].bias.requires_grad_(False)
    model(torch.ones(5, 30)).square().sum().backward()
    grads = {name: p.grad for name, p in model.named_parameters()}
    expected = {name: None if g is None else g.clone() for name, g in grads.items()}
    result = gradclip.clip_by_global_norm_(grads, 0.1)
    norm = torch.nn.utils.get_total_norm([g for g in expected.values() if g is not None])
    assert result.total_norm == pytest.approx(float(norm), rel=1e-6)
    assert result.named_norms()["0.bias"] == 0.0
    assert expected["0.bias"] is None
    for name, grad in grads.items():
        before = expected[name]
        assert grad is None or before is None or torch.allclose(grad, before * float(result.coefficient))


def test_numpy_and_torch_in_one_call_sharing_memory() -> None:
    array = np.ones(10, np.float32)
    tensor = torch.from_numpy(array)
    for grads in ([array, tensor], [tensor, array], [tensor, tensor], [tensor[:5], tensor[4:]]):
        with pytest.raises(ValueError, match=r"grads\[[01]\].*grads\[[01]\]"):
            gradclip.scale_(grads, 2.0)
    gradclip.scale_([tensor[:5], array[5:]], 2.0)
    assert array.tolist() == [2.0] * 10


def _refused(bad: Any, error: type[Exception], finding: str, *, reading: bool = True) -> None:
    good = np.full(5, 3.0)
    calls: list[Callable[[Any], object]] = [
        lambda g: gradclip.clip_by_global_norm_(g, 0.5),
        lambda g: gradclip.clip_by_value_(g, 0.5),
        lambda g: gradclip.scale_(g, 0.5),
    ]
    if reading:
        calls += [gradclip.tensor_norms, gradclip.global_norm, gradclip.Plan]
    for call in calls:
        with pytest.raises(error, match=rf"(?i)^grads\[1\]: expected .+, got .*{finding}"):
            call([good, bad])
        with pytest.raises(error, match=rf"(?i)^grads\['w\.0'\]: expected .+, got .*{finding}"):
            call({"v": good, "w.0": bad})
    assert good.tolist() == [3.0] * 5


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta state")
def test_torch_tensors_that_are_refused() -> None:
    leaf = torch.ones(4, requires_grad=True)
    _refused(leaf, ValueError, "one that does", reading=False)
    _refused(torch.nn.Parameter(torch.ones(4)), ValueError, "one that does", reading=False)
    _refused(leaf * 2, ValueError, "one that does", reading=False)
    _refused(torch.eye(3).to_sparse(), ValueError, "sparse")
    _refused(torch.eye(3).to_sparse_csr(), ValueError, "sparse")
    _refused(torch.ones(3, device="meta"), ValueError, "meta")
    assert leaf.tolist() == [1.0] * 4


def test_torch_views_that_change_signs_are_read_as_they_lie_in_memory() -> None:
    """Neither norms nor clips see signs."""
    values = torch.tensor([3 + 4j, 1 - 2j])
    conjugate, negative = values.clone().conj(), values.clone().conj().imag
    assert conjugate.is_conj()
    assert negative.is_neg()
    for view, norm in ((conjugate, math.sqrt(30)), (negative, math.sqrt(20))):
        before = view.clone()
        assert gradclip.global_norm([view]) == pytest.approx(norm, rel=1e-15)
        gradclip.clip_by_global_norm_([view], norm / 2)
        torch.testing.assert_close(view, before / 2)
        plan = gradclip.Plan([view])
        assert plan.clip_by_global_norm_(norm / 4).total_norm == pytest.approx(norm / 2, rel=1e-7)
        torch.testing.assert_close(view, before / 4)
    gradclip.clip_by_value_([negative], 0.5)
    assert negative.tolist() == [-0.5, 0.5]


@pytest.fixture
def dtensor() -> Iterator[Any]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
    try:
        yield DTensor.from_local(torch.full((4,), 3.0), init_device_mesh("cpu", (1,)), [Replicate()])
    finally:
        dist.destroy_process_group()


def test_torch_dtensor(dtensor: Any) -> None:
    """Measured and clipped over its ranks, here one; refused where that is not done."""
    with pytest.raises(
        TypeError, match=r"^grads: expected plain tensors for a clip by value .* got DTensors"
    ):
        gradclip.clip_by_value_([dtensor], 0.5)
    with pytest.raises(TypeError, match=r"^grads\[0\]: expected .+, got .*DTensor"):
        gradclip.Plan([dtensor])
    assert dtensor.to_local().tolist() == [3.0] * 4
    assert gradclip.global_norm([dtensor.to_local()]) == gradclip.global_norm([dtensor]) == 6.0
    gradclip.scale_([dtensor], 2.0)
    assert gradclip.clip_by_global_norm_([dtensor], 6.0).total_norm == 12.0
    assert dtensor.to_local().tolist() == [3.0] * 4


@pytest.mark.parametrize("ord", ORDS)
@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("float64", "complex128")])
def test_jax_norms(name: str, ord: float) -> None:
    """64-bit types are off in jax unless asked for."""
    arrays = [values(name, n, seed=n) for n in (1, 130, 9001)]
    tensors = [jnp.asarray(array) for array in arrays]
    assert all(t.dtype == DTYPES[name] for t in tensors)
    assert gradclip.tensor_norms(tensors, ord).tobytes() == gradclip.tensor_norms(arrays, ord).tobytes()
    plan = gradclip.Plan({"a": tensors[0], "b": tensors[2]})
    assert plan.global_norm(ord) == gradclip.global_norm([arrays[0], arrays[2]], ord)


def test_jax_scalars_and_shapes() -> None:
    assert gradclip.tensor_norms([jnp.float32(-3.0), jnp.ones((4, 4)), jnp.zeros((0, 2))]).tolist() == [
        3,
        4,
        0,
    ]


class Foreign:
    """An array of a library that nobody knows: two methods, nothing else."""

    def __init__(self, array: Array, device: tuple[int, int] = (1, 0)) -> None:
        self.array, self.device = array, device
        self.asked = 0

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.device

    def __dlpack__(self, **options: Any) -> Any:
        self.asked += 1
        return self.array.__dlpack__(**options)


class Legacy(Foreign):
    """As it was before version 1.0 of the protocol: an unversioned capsule, no keywords."""

    def __dlpack__(self, stream: Any = None) -> Any:  # type: ignore[override]
        return self.array.__dlpack__()


@pytest.mark.parametrize("kind", [Foreign, Legacy])
@pytest.mark.parametrize("name", [name for name in NAMES if name != "bfloat16"])
def test_any_object_with_dlpack(name: str, kind: type[Foreign]) -> None:
    array = values(name, (30, 40), seed=1)
    expected = scaled(array, 0.5)
    foreign = kind(array.T)
    assert gradclip.global_norm([foreign]) == gradclip.global_norm([array])
    gradclip.scale_([foreign], 0.5)
    assert array.tobytes() == expected.tobytes()
    plan = gradclip.Plan([foreign])
    assert plan.global_norm() == gradclip.global_norm([array])
    with pytest.raises(ValueError, match=r"grads\[1\].*grads\[0\]|grads\[0\].*grads\[1\]"):
        gradclip.scale_([foreign, array], 0.5)


def test_read_only_through_dlpack() -> None:
    array = np.full(4, 2.0)
    array.flags.writeable = False
    assert gradclip.global_norm([Foreign(array)]) == 4.0
    _refused(Foreign(array), ValueError, "read-only", reading=False)
    assert array.tolist() == [2.0] * 4


@pytest.mark.parametrize(
    ("device", "name"),
    [((2, 0), "CUDA|GPU"), ((2, 3), "CUDA|GPU"), ((10, 0), "ROCm|GPU"), ((8, 0), "Metal|GPU")],
)
def test_an_object_on_a_gpu_is_told_so(device: tuple[int, int], name: str) -> None:
    """By its device alone: nobody asks it for data that cannot be read here."""
    foreign = Foreign(np.ones(3), device)
    _refused(foreign, ValueError, f"({name})")
    assert foreign.asked == 0


class _Fails:
    def __dlpack_device__(self) -> tuple[int, int]:
        return (1, 0)

    def __dlpack__(self, **options: Any) -> Any:
        raise RuntimeError("the data has been deleted")


class _NoCapsule(Foreign):
    def __dlpack__(self, **options: Any) -> Any:
        return self.array


class _BadDevice(Foreign):
    def __dlpack_device__(self) -> Any:
        return "cpu"


def test_objects_that_break_the_protocol() -> None:
    good = np.full(4, 2.0)
    for bad in (_Fails(), _NoCapsule(np.ones(3)), _BadDevice(np.ones(3))):
        for call in (gradclip.tensor_norms, lambda g: gradclip.scale_(g, 0.5)):
            with pytest.raises((TypeError, ValueError, RuntimeError, BufferError)):
                call([good, bad])
    used = Foreign(np.ones(3)).__dlpack__()
    np.from_dlpack(
        type("Used", (), {"__dlpack__": lambda s, **o: used, "__dlpack_device__": lambda s: (1, 0)})()
    )
    consumed = type("Consumed", (Foreign,), {"__dlpack__": lambda s, **o: used})(np.ones(3))
    with pytest.raises((TypeError, ValueError, BufferError)):
        gradclip.tensor_norms([good, consumed])
    assert good.tolist() == [2.0] * 4


@pytest.mark.parametrize("kind", [Foreign, Legacy])
def test_capsules_are_given_back(kind: type[Foreign]) -> None:
    array = np.full(1000, 2.0)
    watch = weakref.ref(array)
    foreign: Foreign | None = kind(array)
    references = sys.getrefcount(array)
    for _ in range(50):
        gradclip.clip_by_global_norm_([foreign], 1.0)
        gradclip.tensor_norms([foreign, foreign])
        with pytest.raises(TypeError):
            gradclip.tensor_norms([foreign, "text"])
    assert sys.getrefcount(array) == references
    plan = gradclip.Plan([foreign])
    del array, foreign
    gc.collect()
    assert watch() is not None, "a plan keeps what it was made of"
    assert plan.global_norm(math.inf) > 0
    del plan
    gc.collect()
    assert watch() is None


def test_torch_storage_lives_as_long_as_a_plan() -> None:
    tensor = torch.full((100_000,), 2.0)
    plan = gradclip.Plan([tensor])
    watch = weakref.ref(tensor)
    del tensor
    gc.collect()
    assert watch() is not None
    assert plan.global_norm(math.inf) == 2.0
    del plan
    gc.collect()
    assert watch() is None
