"""The gradclip contenders of the benchmark on a GPU do every job rightly: emulated, and on a real one."""

from __future__ import annotations

import math

import numpy as np
import pytest

from bench.cases import CASES, Load
from bench.data import Gradients
from bench.jobs import JOBS, NORMS
from bench.peers import GPU, OURS, PEERS, ours
from device import Device

_KEYS = [key for key in PEERS if key.startswith("gradclip-gpu")]


def test_they_are_the_gpus() -> None:
    assert OURS[GPU] in _KEYS
    assert all(PEERS[key].place == GPU for key in _KEYS)


@pytest.mark.parametrize("job", JOBS)
@pytest.mark.parametrize("peer", _KEYS)
def test_every_job(peer: str, job: str, device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    on_host = ours.on_host
    monkeypatch.setattr(ours, "on_host", lambda a: on_host(a) if hasattr(a, "to_host") else device.host(a))
    host = Gradients(Load(CASES["bytes-4K"])).arrays
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
