"""The gradclip contenders of the benchmark on a GPU do every job rightly: emulated, and on a real one."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import cupy
import numpy as np
import pytest

import bench.device
from bench.cases import CASES, Load
from bench.data import GradientBuffer
from bench.device import FLAT_SUM
from bench.jobs import JOBS, NORMS, STANDARD
from bench.peers import GPU, OURS, PEERS, ours, present, with_jax
from bench.timing import Clock
from bench.workload import READ, READ_WRITE, Location, Workload
from device import Device, EmulatedBuffer, emulated_device
from gradclip._dispatch import why_no_gpu
from tools import gpu

_KEYS = [key for key in PEERS if key.startswith("gradclip-gpu")]


def test_they_are_the_gpus() -> None:
    assert OURS[GPU] in _KEYS
    assert all(PEERS[key].place == GPU for key in _KEYS)


@pytest.mark.parametrize("job", STANDARD)
@pytest.mark.parametrize("peer", _KEYS)
def test_every_job(peer: str, job: str, device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    on_host = ours.on_host
    monkeypatch.setattr(ours, "on_host", lambda a: on_host(a) if hasattr(a, "to_host") else device.host(a))
    host = GradientBuffer(Load(CASES["bytes-4K"])).arrays
    norms = [math.sqrt(math.fsum(x * x for x in g.astype(np.float64).flat)) for g in host]
    total = math.hypot(*norms)
    contender = PEERS[peer]([device.array(g) for g in host])
    todo = JOBS[job]
    max_norm = todo.threshold(total)
    answer = contender.call(todo, max_norm)()
    assert contender.total(answer) == pytest.approx(total / todo.scale, rel=1e-7)
    found = contender.layer_norms(answer)
    assert found == pytest.approx([norm / todo.scale for norm in norms], rel=1e-7)
    if job != NORMS:
        contender.confirm(answer, max_norm, todo.coefficient < 1)
        with pytest.raises(AssertionError, match="clipped"):
            contender.confirm(answer, max_norm, todo.coefficient == 1)
    for now, before in zip(contender.current(answer), host, strict=True):
        assert np.array_equal(device.host(now), before * np.float32(todo.coefficient))
    contender.undo(answer, 1 / todo.coefficient)
    for now, before in zip(contender.grads, host, strict=True):
        assert np.array_equal(device.host(now), before)


def test_optax_on_a_gpu_but_for_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies go where they are told to, and each job is done."""
    assert PEERS["optax-cuda"].missing() or not why_no_gpu()
    assert with_jax._cuda_is_missing() in (None, "this JAX reaches no GPU")
    monkeypatch.setattr(with_jax.OptaxCuda, "platform", "cpu")
    assert with_jax._cuda_is_missing() is None
    grads = GradientBuffer(Load(CASES["bytes-4K"])).arrays
    total = math.hypot(*(float(np.linalg.norm(grad)) for grad in grads))
    for job in map(JOBS.__getitem__, STANDARD):
        peer = with_jax.OptaxCuda(grads)
        assert all(grad.committed for grad in peer._jax_grads)
        answer = peer.call(job, job.threshold(total))()
        if job.key == NORMS:
            assert peer.total(answer) == pytest.approx(total, rel=1e-5)
            continue
        peer.confirm(answer, job.threshold(total), job.coefficient < 1)
        for now, before in zip(peer.current(answer), grads, strict=True):
            np.testing.assert_allclose(now, before * np.float32(job.coefficient), rtol=1e-5)


@pytest.mark.parametrize("key", PEERS)
def test_how_many_tensors_a_contender_takes(key: str) -> None:
    most = PEERS[key].most_tensors
    assert PEERS[key].takes(most or 10**6)
    assert most is None or not PEERS[key].takes(most + 1)


def _device_clock(call: Callable[[], Any]) -> tuple[Any, tuple[float]]:
    return call(), (1.0,)


def _host_clock(call: Callable[[], Any]) -> tuple[Any, tuple[float, float]]:
    return call(), (2.0, 3.0)


class _EmulatedPlace(Location):
    name, make = GPU, EmulatedBuffer

    @staticmethod
    def clocks(waits: bool) -> Mapping[Clock, tuple[str, ...]]:
        return {_device_clock: ("",), _host_clock: ("@host", "@done")}

    def rooflines(self, grads: Sequence[Any]) -> dict[str, tuple[Callable[[], Any], Clock]]:
        return {what: (lambda: None, _device_clock) for what in (READ, READ_WRITE, FLAT_SUM)}


def test_the_current_device_is_described(monkeypatch: pytest.MonkeyPatch) -> None:
    class Two:
        """Of two devices the second is the current one."""

        device_info = staticmethod(lambda device: (f"GPU {device}", 9, 0, 132, 80e9))
        driver_version = runtime_version = staticmethod(lambda: 13000)

    monkeypatch.setattr(bench.device, "cuda_module", Two)
    # Of an H100, in kHz and bits: two edges of the clock.
    attributes = {cupy.cuda.runtime.cudaDevAttrMemoryClockRate: 2619000}
    attributes[cupy.cuda.runtime.cudaDevAttrGlobalMemoryBusWidth] = 5120
    monkeypatch.setattr(cupy.cuda.runtime, "getDevice", lambda: 1)
    monkeypatch.setattr(cupy.cuda.runtime, "deviceGetAttribute", lambda what, device: attributes[what])
    described = bench.device.describe_gpu()
    assert described["gpu"] == "GPU 1"
    assert described["peak_bytes_per_s"] == pytest.approx(3.35e12, rel=1e-3)


def test_every_contender_on_a_gpu_has_a_name_in_its_report() -> None:
    assert set(gpu._NAMES.values()) == {key for key, peer in PEERS.items() if peer.place == GPU}


def test_mistakes_are_told_before_a_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    for arguments, told in (
        (["--rounds", "0"], "--rounds: expected 1 or more, got 0"),
        (["--out", str(tmp_path)], "--out: expected a file that can be written, got "),
    ):
        monkeypatch.setattr("sys.argv", ["tools.gpu", *arguments])
        with pytest.raises(SystemExit):
            gpu.main()
        assert told in capsys.readouterr().err


def test_a_gpus_run_has_three_times_of_everybody(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the suite's own way, but for memory and events. CuPy's own kernels cannot run, and are told."""
    with emulated_device() as device:
        on_host = ours.on_host
        monkeypatch.setattr(
            ours, "on_host", lambda a: on_host(a) if hasattr(a, "to_host") else device.host(a)
        )
        workload = Workload(Load(CASES["bytes-4K"]), _EmulatedPlace)
        assert gpu.check(workload.gradients) == pytest.approx(workload.total, rel=1e-7)
        found = gpu._measure(workload, 2, [key for key in present() if PEERS[key].place == GPU])
    one = {"device": [1.0, 1.0]}
    taken = one | {"host": [2.0, 2.0], "wall": [3.0, 3.0]}
    rooflines = {"ceiling": one, "CUB sum of one array": one}
    assert found["norms"] == found["not clipping"] == rooflines | {"gradclip": taken, "gradclip Plan": taken}
    assert found["clipping"] == {"ceiling": {"device": [2.0, 2.0]}, "gradclip": taken, "gradclip Plan": taken}
    assert {name.split("/")[-1] for name in found["failures"]} == {"cupy-nrm2", "cupy-sum"}
    machine = {"gpu": "A", "multiprocessors": 1, "driver_cuda": 1, "date": "d", "commit": "c"}
    cases = {"a case": found | {"nbytes": 4096}}
    results = {"machine": machine | {"peak_bytes_per_s": 12288}, "cases": cases, "left_out": []}
    text = gpu.markdown(results)
    assert "| a case | clipping | gradclip Plan | 1000000.0 | 2000000.0 | 3000000.0 | 2.00 | 1.00 |" in text
    assert "| a case | norms | CUB sum of one array | 1000000.0 | - | - | 1.00 | 0.33 |" in text
    assert "Failed: a case, bytes-4K/float32/clip/cupy-sum: not tried: see its norms" in text
