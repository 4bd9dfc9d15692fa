"""gradclip.torch on a real GPU: the bits of a CPU, devices mixed, streams, no waits, mixed precision."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gradclip.distributed
import gradclip.torch
from gradclip.distributed._collective import device_for, reduced

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU: this PyTorch has no CUDA"),
]

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.complex128]
BUSY_SECONDS = 0.2


def _twins(dtypes: list[torch.dtype], sizes: tuple[int, ...] = (7, 4097, 0, 100_000)) -> tuple[Any, Any]:
    """Parameters on the CPU and on the GPU with the same gradients."""
    generator = torch.Generator().manual_seed(5)
    host: list[nn.Parameter] = []
    device: list[nn.Parameter] = []
    for size in sizes:
        for dtype in dtypes:
            grad = torch.randn(size, generator=generator, dtype=torch.float64).to(dtype)
            for parameters, where in ((host, "cpu"), (device, "cuda")):
                parameters.append(nn.Parameter(torch.zeros(size, dtype=dtype, device=where)))
                parameters[-1].grad = grad.to(where, copy=True)
    return host, device


def _assert_same_bits(host: list[nn.Parameter], device: list[nn.Parameter]) -> None:
    for a, b in zip(host, device, strict=True):
        assert a.grad is not None
        assert b.grad is not None
        assert b.grad.is_cuda
        assert torch.equal(a.grad.view(torch.uint8), b.grad.cpu().view(torch.uint8))


def _keep_busy() -> None:
    """Fill the current stream with work of BUSY_SECONDS that the host does not wait for."""
    cycles = int(BUSY_SECONDS * 1.5e9)  # sleeping lasts longer where the clock is slower
    torch.cuda._sleep(cycles)  # type: ignore[no-untyped-call]


def _seconds(call: Any) -> float:
    torch.cuda.synchronize()
    _keep_busy()
    start = time.perf_counter()
    call()
    waited = time.perf_counter() - start
    torch.cuda.synchronize()
    assert time.perf_counter() - start > BUSY_SECONDS / 4, "the stream was not busy: nothing is shown"
    return waited


@pytest.mark.parametrize("norm_type", [2.0, 1.0, math.inf, 3.0])
@pytest.mark.parametrize("dtypes", [[dtype] for dtype in DTYPES] + [DTYPES], ids=str)
def test_the_bits_of_a_cpu(dtypes: list[torch.dtype], norm_type: float) -> None:
    for max_norm in (0.5, 1e9):
        host, device = _twins(dtypes)
        expected = gradclip.torch.clip_grad_norm_(host, max_norm, norm_type)
        total = gradclip.torch.clip_grad_norm_(device, max_norm, norm_type)
        assert total.is_cuda
        assert total.dtype == expected.dtype
        assert torch.equal(total.cpu(), expected)
        _assert_same_bits(host, device)


def test_measured_and_scaled_apart() -> None:
    host, device = _twins([torch.float32, torch.bfloat16])
    norms = [gradclip.torch.get_total_norm([p.grad for p in each]) for each in (host, device)]
    assert torch.equal(norms[0], norms[1].cpu())
    gradclip.torch.clip_grads_with_norm_(host, 0.5, norms[0])
    gradclip.torch.clip_grads_with_norm_(device, 0.5, norms[1])
    _assert_same_bits(host, device)
    gradclip.torch.clip_grad_value_(host, 1e-3)
    gradclip.torch.clip_grad_value_(device, 1e-3)
    _assert_same_bits(host, device)


def test_devices_mixed_in_one_call() -> None:
    host, device = _twins([torch.float32])
    alone, _ = _twins([torch.float32])
    mixed = [*host[:2], *device[2:]]
    total = gradclip.torch.clip_grad_norm_(mixed, 0.5)
    expected = gradclip.torch.clip_grad_norm_(alone, 0.5)
    assert total.device == torch.device("cpu")
    torch.testing.assert_close(total, expected)
    for a, b in zip(mixed, alone, strict=True):
        assert a.grad is not None
        assert b.grad is not None
        torch.testing.assert_close(a.grad.cpu(), b.grad)


def test_the_host_does_not_wait() -> None:
    _, device = _twins([torch.float32, torch.bfloat16])
    limit = torch.tensor(0.5, device="cuda")
    grads = [p.grad for p in device]

    def module() -> Any:
        named = [(str(i), p) for i, p in enumerate(device)]
        return gradclip.torch.clip_module_(named, limit, nonfinite="skip")

    def optimizer_groups() -> Any:
        optimizer = torch.optim.SGD([{"params": [p]} for p in device], lr=0.1)
        return gradclip.torch.clip_param_groups_(optimizer, [0.5] * len(device), nonfinite="skip")

    for call in (
        lambda: gradclip.torch.clip_grad_norm_(device, 0.5),
        lambda: gradclip.torch.clip_grad_norm_(device, limit),
        lambda: gradclip.torch.get_total_norm(grads),
        lambda: gradclip.torch.clip_grads_with_norm_(device, 0.5, limit),
        lambda: gradclip.torch.clip_grads_with_norm_(device, limit, limit),
        lambda: gradclip.torch.clip_grad_value_(device, 0.5),
        module,
        optimizer_groups,
        lambda: gradclip.torch.get_total_norm([*grads, torch.ones(3)]),  # the CPU's norm goes to the GPU
    ):
        call()
        assert _seconds(call) < BUSY_SECONDS / 4


def test_a_side_stream() -> None:
    host, device = _twins([torch.float32])
    expected = gradclip.torch.clip_grad_norm_(host, 0.5)
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        _keep_busy()
        for parameter in device:
            parameter.grad = (parameter.grad * 1.0).clone() if parameter.grad is not None else None
        total = gradclip.torch.clip_grad_norm_(device, 0.5)
    stream.synchronize()
    assert torch.equal(total.cpu(), expected)
    _assert_same_bits(host, device)


def test_what_is_not_finite_is_named() -> None:
    _, device = _twins([torch.float32])
    assert device[1].grad is not None
    device[1].grad[3] = math.nan
    before = [p.grad.clone() for p in device]
    with pytest.raises(RuntimeError, match=r"^parameters\[1\]\.grad: .* got 1 NaN and 0 inf"):
        gradclip.torch.clip_grad_norm_(device, 0.5, error_if_nonfinite=True)
    for parameter, grad in zip(device, before, strict=True):
        torch.testing.assert_close(parameter.grad, grad, rtol=0, atol=0, equal_nan=True)


def test_pytorchs_own_functions_take_this_way() -> None:
    host, device = _twins([torch.float32])
    expected = gradclip.torch.clip_grad_norm_(host, 0.5)
    with gradclip.torch.patched() as counts:
        total = torch.nn.utils.clip_grad_norm_(device, 0.5)
    assert torch.equal(total.cpu(), expected)
    assert not counts.passed_on
    for a, b in zip(host, device, strict=True):  # by way of a norm that is rounded to float32
        torch.testing.assert_close(a.grad, None if b.grad is None else b.grad.cpu())


def test_a_threshold_for_each_parameter_group() -> None:
    host, device = _twins([torch.float32], (10, 20, 30))
    results = []
    for parameters in (host, device):
        optimizer = torch.optim.SGD([{"params": [p]} for p in parameters], lr=0.1)
        results.append(gradclip.torch.clip_param_groups_(optimizer, [0.5, math.inf, 1.0]))
    assert results[0].named_group_norms() == results[1].named_group_norms()
    _assert_same_bits(host, device)


def _scaled(where: str) -> tuple[list[nn.Parameter], torch.optim.Optimizer, Any]:
    parameters = [nn.Parameter(torch.zeros(n, device=where)) for n in (100, 5000)]
    generator = torch.Generator().manual_seed(6)
    for parameter in parameters:
        parameter.grad = (1024 * torch.randn(parameter.shape, generator=generator)).to(where)
    scaler = torch.amp.GradScaler(where, init_scale=1024.0)
    scaler.scale(torch.ones((), device=where))
    return parameters, torch.optim.AdamW(parameters, lr=0.1, fused=True), scaler


@pytest.mark.parametrize("bad", [None, math.inf])
@pytest.mark.parametrize("deferred", [False, True])
def test_mixed_precision(deferred: bool, bad: float | None) -> None:
    def steps(where: str) -> tuple[Tensor, list[Tensor], float]:
        parameters, optimizer, scaler = _scaled(where)
        if bad is not None and parameters[0].grad is not None:
            parameters[0].grad[0] = bad
        if deferred:
            total = gradclip.torch.defer_clip_(optimizer, 0.5, scaler=scaler)
        else:
            total = gradclip.torch.unscale_and_clip_(scaler, optimizer, 0.5)
        scaler.step(optimizer)
        scaler.update()
        return total.cpu(), [p.detach().cpu() for p in parameters], scaler.get_scale()

    host, device = steps("cpu"), steps("cuda")
    assert torch.equal(host[0], device[0])
    assert host[2] == device[2] == (1024.0 if bad is None else 512.0)
    for a, b in zip(host[1], device[1], strict=True):
        torch.testing.assert_close(a, b)
    assert bad is None or not any(p.any() for p in device[1])


def test_a_step_that_clips() -> None:
    parameters, optimizer, _ = _scaled("cuda")
    twins, other, _ = _scaled("cuda")
    gradclip.torch.defer_clip_(optimizer, 0.5)
    gradclip.torch.clip_grad_norm_(twins, 0.5)
    optimizer.step()
    other.step()
    for a, b in zip(parameters, twins, strict=True):
        torch.testing.assert_close(a, b)


def test_fully_sharded_with_offload_to_the_cpu_under_nccl(tmp_path: Path) -> None:
    """Gradients on the CPU, a process group that reduces nothing there (pytorch#148532)."""
    import torch.distributed as dist  # noqa: PLC0415 (not in every build)
    from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard  # noqa: PLC0415

    dist.init_process_group("nccl", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = nn.Sequential(nn.Linear(30, 20), nn.Linear(20, 10))
        for layer in (*model, model):
            fully_shard(layer, offload_policy=CPUOffloadPolicy())
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        for _ in range(2):
            (model(torch.ones(4, 30, device="cuda")) ** 2).sum().backward()
            grads: list[Any] = [p.grad for p in model.parameters()]
            shards = [grad._local_tensor for grad in grads]
            assert all(shard.device.type == "cpu" for shard in shards)
            expected = torch.nn.utils.get_total_norm(shards).item()
            norm: Any = gradclip.torch.clip_grad_norm_(model.parameters(), 0.5)
            assert norm.full_tensor().item() == pytest.approx(expected, rel=1e-6)
            clipped = torch.nn.utils.get_total_norm([grad._local_tensor for grad in grads]).item()
            assert clipped == pytest.approx(0.5, rel=1e-5)
            optimizer.step()
            optimizer.zero_grad()
        # One rank needs no collective: numbers of the CPU, through the group itself.
        group: Any = dist.group.WORLD
        there = device_for(group, torch.device("cpu"))
        assert there.type == "cuda"
        for order in (2.0, math.inf):
            numbers = torch.tensor([3.0, 4.0], dtype=torch.float64)
            assert reduced(numbers.to(there), order, group).tolist() == [3.0, 4.0]
        reduce = gradclip.distributed.process_group(ord=2)
        measured = gradclip.accumulate_([torch.zeros(2)], [torch.tensor([3.0, 4.0])], reduce=reduce)
        assert measured.total_norm == 5.0
    finally:
        dist.destroy_process_group()


def test_sparse_gradients() -> None:
    norms = []
    for where in ("cpu", "cuda"):
        embedding = nn.Embedding(10, 3, sparse=True, device=where)
        with torch.no_grad():
            embedding.weight.copy_(torch.arange(30.0).view(10, 3))
        (embedding(torch.tensor([1, 2, 1], device=where)) ** 2).sum().backward()
        norms.append(gradclip.torch.clip_grad_norm_(embedding.parameters(), 1.0).cpu())
        grad = embedding.weight.grad
        assert grad is not None
        torch.testing.assert_close(grad.to_dense().norm().cpu(), torch.tensor(1.0))
    assert torch.equal(norms[0], norms[1])
