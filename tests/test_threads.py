"""Never in the way: many threads at once, the GIL released, no thread for small work, fork after use."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

import gradclip
from matrices import NAMES, THREADS, Array, values
from processes import output_of


def _grads(seed: int) -> list[Array]:
    return [values(name, n, seed=seed + n) for name in NAMES for n in (7, 30_001, 200_003)]


def test_eight_threads_at_once() -> None:
    """Each clips its own gradients again and again, and all measure one common list."""
    gradclip.set_num_threads(3)
    common = _grads(0)
    norms = gradclip.tensor_norms(common).tobytes()
    expected = []
    for seed in range(8):
        grads = _grads(seed)
        gradclip.clip_by_global_norm_(grads, 0.5)
        expected.append([array.tobytes() for array in grads])
    start = threading.Barrier(8)

    def work(seed: int) -> int:
        start.wait()
        for _ in range(6):
            grads = _grads(seed)
            plan = gradclip.Plan(grads)
            assert gradclip.tensor_norms(common).tobytes() == norms
            plan.clip_by_global_norm_(0.5)
            assert [array.tobytes() for array in grads] == expected[seed]
        return seed

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(work, range(8))) == list(range(8))


def test_threads_and_settings_may_change_while_others_work() -> None:
    common = _grads(0)
    norms = gradclip.tensor_norms(common).tobytes()
    stop = threading.Event()

    def measure() -> int:
        calls = 0
        while not stop.is_set():
            assert gradclip.tensor_norms(common).tobytes() == norms
            calls += 1
        return calls

    with ThreadPoolExecutor(4) as pool:
        workers = [pool.submit(measure) for _ in range(4)]
        try:
            for i in range(100):
                gradclip.set_num_threads(THREADS[i % len(THREADS)])
                time.sleep(0.01)
        finally:
            stop.set()
        assert all(worker.result() > 0 for worker in workers)


def test_the_gil_is_released() -> None:
    """Another Python thread goes on in the middle of a long call."""
    array = np.random.default_rng(0).random(6_000_000)  # powers of 1 would be quick
    gradclip.set_num_threads(1)
    ticks: list[float] = []
    stop = threading.Event()

    def tick() -> None:
        while not stop.is_set():
            ticks.append(time.perf_counter())
            time.sleep(0.001)

    other = threading.Thread(target=tick)
    other.start()
    try:
        start = time.perf_counter()
        gradclip.tensor_norms([array], 2.5)  # the slow norm
        end = time.perf_counter()
    finally:
        stop.set()
        other.join()
    third = (end - start) / 3
    assert third > 0.01, "the call is too short to see anything"
    assert sum(start + third < t < end - third for t in ticks) >= 3


def test_a_small_call_keeps_the_gil() -> None:
    """To get it back from a thread that computes would take 5 ms."""
    output_of(
        """
        import sys, threading
        import numpy as np
        import gradclip
        small, large = [[np.ones(n, np.float32)] * 3 for n in (64, 4_000_000)]
        seen = []
        waits = threading.Lock()

        def see():
            with waits:
                seen.append(1)

        plan = gradclip.Plan([np.ones(64, np.float32)])
        sys.setswitchinterval(1000)  # nobody is asked for the GIL: who has it gives it up
        with waits:
            other = threading.Thread(target=see)
            other.start()
        for _ in range(10_000):
            gradclip.global_norm(small)
            plan.clip_by_global_norm_(1e-3)
        assert not seen, "a small call has given the GIL up"
        for _ in range(1000):
            gradclip.global_norm(large)
        assert seen, "nobody was waiting: nothing is shown"
        other.join()
        """
    )


def test_set_and_get() -> None:
    for n in (1, 2, 3, 8, 1024):
        gradclip.set_num_threads(n)
        assert gradclip.get_num_threads() == n
    gradclip.set_num_threads(np.int64(2))  # type: ignore[arg-type]
    assert gradclip.get_num_threads() == 2


def test_no_thread_for_small_work() -> None:
    code = """
    import os
    import numpy as np
    import gradclip
    from gradclip import _core
    tasks = lambda: len(os.listdir("/proc/self/task"))
    before = tasks()
    small = [np.ones(64, np.float32) for _ in range(300)]
    plan = gradclip.Plan(small)
    for _ in range(100):
        gradclip.clip_by_global_norm_(small, 1.0)
        plan.tensor_norms()
    assert _core.num_started_threads() == 0 and tasks() == before
    large = [np.ones(4_000_000, np.float32) for _ in range(4)]
    gradclip.global_norm(large)
    started = _core.num_started_threads()
    assert 1 <= started <= 3 and tasks() == before + started, (started, tasks(), before)
    gradclip.set_num_threads(1)
    gradclip.global_norm(large)
    assert _core.num_started_threads() == started
    print("fine")
    """
    assert output_of(code, GRADCLIP_NUM_THREADS="4", OPENBLAS_NUM_THREADS="1") == "fine"


def test_help_is_borrowed_from_torch_while_its_team_looks_for_work() -> None:
    """The threads that the product before had take the chunks: ours are not even started."""
    code = """
    import os
    import numpy as np
    import torch
    import gradclip
    from gradclip import _core
    torch.set_num_threads(2)
    grads = [torch.ones(100_000) for _ in range(20)]
    a = torch.ones(400, 400)
    expected = gradclip.tensor_norms([grad.numpy() for grad in grads]).tobytes()
    assert _core.num_started_threads() == 1
    who = set()
    for call in range(5000):
        if call >= 200 and "openmp" in who:
            break  # where others use the processors, too, it can take long
        a @ a
        assert gradclip.tensor_norms(grads).tobytes() == expected
        who.add(_core.helpers_of_last_call())
    assert "openmp" in who or len(os.sched_getaffinity(0)) == 1, who
    print("fine")
    """
    assert output_of(code, GRADCLIP_NUM_THREADS="2") == "fine"


def test_the_child_of_a_fork_borrows_nobody() -> None:
    """The threads of the parent's team do not exist there."""
    code = """
    import os, signal
    import torch
    import gradclip
    from gradclip import _core
    torch.set_num_threads(2)
    grads = [torch.ones(100_000) for _ in range(20)]
    a = torch.ones(400, 400)
    expected = gradclip.tensor_norms(grads).tobytes()
    for _ in range(200):
        a @ a
        gradclip.tensor_norms(grads)
        if _core.helpers_of_last_call() == "openmp":
            break
    pid = os.fork()
    if pid == 0:
        signal.alarm(600)
        fine = True
        for _ in range(200):
            fine = fine and gradclip.tensor_norms(grads).tobytes() == expected
            fine = fine and _core.helpers_of_last_call() != "openmp"
        os._exit(0 if fine else 1)
    assert os.waitpid(pid, 0)[1] == 0
    print("fine")
    """
    assert output_of(code, GRADCLIP_NUM_THREADS="2") == "fine"


_FORK = """
import os, signal, sys, threading, time, warnings
import numpy as np
import gradclip

# Newer Pythons warn about any fork of a process with threads; that is the subject here.
warnings.simplefilter("ignore", DeprecationWarning)
gradclip.set_num_threads(3)
rng = np.random.default_rng(1)
grads = [rng.standard_normal(n).astype(np.float32) for n in (5, 3_000_001, 1_500_000)]
norms = gradclip.tensor_norms(grads).tobytes()

def in_child(work):
    "Run work in a forked child; the child has 600 s and must end well."
    pid = os.fork()
    if pid == 0:
        signal.alarm(600)
        try:
            work()
        except BaseException:
            import traceback
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    _, status = os.waitpid(pid, 0)
    assert status == 0, f"child ended with status {status}"

def clip_and_compare():
    assert gradclip.tensor_norms(grads).tobytes() == norms
    copies = [g.copy() for g in grads]
    result = gradclip.clip_by_global_norm_(copies, 1.0)
    assert abs(gradclip.global_norm(copies) - 1.0) < 1e-6
    assert gradclip.Plan(grads).tensor_norms().tobytes() == norms
    gradclip.set_num_threads(2)
    assert gradclip.tensor_norms(grads).tobytes() == norms

def clip_serially():
    clip_and_compare()
    assert gradclip._core.num_started_threads() == 0, "the child works serially"
"""


def test_fork_after_use() -> None:
    code = _FORK + "in_child(clip_serially)\nclip_and_compare()\nin_child(lambda: in_child(clip_serially))\n"
    output_of(code + "print('fine')")


def test_fork_of_a_plan() -> None:
    code = """
plan = gradclip.Plan(grads)
assert plan.tensor_norms().tobytes() == norms
def work():
    assert plan.tensor_norms().tobytes() == norms
    assert plan.clip_by_global_norm_(1.0).clipped
in_child(work)
assert plan.tensor_norms().tobytes() == norms
"""
    output_of(_FORK + code)


def test_fork_while_other_threads_are_in_a_call() -> None:
    """Whatever lock they hold at that moment, the child must not wait for it."""
    code = """
stop = threading.Event()
def busy():
    while not stop.is_set():
        gradclip.tensor_norms(grads)
workers = [threading.Thread(target=busy) for _ in range(3)]
for worker in workers:
    worker.start()
try:
    for _ in range(15):
        in_child(clip_serially)
finally:
    stop.set()
for worker in workers:
    worker.join()
assert gradclip.tensor_norms(grads).tobytes() == norms
"""
    output_of(_FORK + code)


def test_exit_while_a_thread_is_in_a_call() -> None:
    code = _FORK + (
        "def busy():\n"
        "    while True:\n"
        "        gradclip.tensor_norms(grads)\n"
        "threading.Thread(target=busy, daemon=True).start()\n"
        "time.sleep(0.2)\n"
        "print('leaving')\n"
    )
    assert output_of(code) == "leaving"


@pytest.mark.parametrize("threads", [1, 2, 8])
def test_errors_in_threads_stay_there(threads: int) -> None:
    gradclip.set_num_threads(threads)
    good, bad = np.ones(500_000, np.float32), np.full(500_000, np.nan, np.float32)

    def work(i: int) -> bool:
        try:
            gradclip.clip_by_global_norm_([good.copy(), bad.copy()] if i % 2 else [good.copy()], 1.0)
        except gradclip.NonFiniteGradientError:
            return True
        return False

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(work, range(20))) == [i % 2 == 1 for i in range(20)]
