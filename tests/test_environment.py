"""What import does (nothing), and what the environment variables set or break."""

from __future__ import annotations

import os
from typing import Any

import pytest

from matrices import ISAS
from processes import output_of, run_python

_THREADS = "import gradclip; print(gradclip.get_num_threads())"
_ISA = "from gradclip import _core; print(_core.get_isa())"


def test_import_loads_no_framework_and_starts_no_thread() -> None:
    code = """
    import os, sys
    import numpy
    threads = len(os.listdir("/proc/self/task"))
    before = set(sys.modules)
    import gradclip
    gradclip.global_norm({"w": numpy.ones(3)})
    loaded = {name.partition(".")[0] for name in set(sys.modules) - before}
    frameworks = {"torch", "jax", "jaxlib", "cupy", "ml_dtypes", "tensorflow", "optax", "sklearn", "flwr"}
    assert not loaded & frameworks, loaded & frameworks
    assert not {name for name in sys.modules if name in frameworks}
    assert len(os.listdir("/proc/self/task")) == threads
    print("clean")
    """
    assert output_of(code) == "clean"


def test_only_numpy_is_needed() -> None:
    """With every optional package made impossible to import."""
    code = """
    import sys
    for name in ("torch", "jax", "cupy", "ml_dtypes", "sklearn", "matplotlib", "rich"):
        sys.modules[name] = None
    import numpy as np
    import gradclip
    grads = [np.full(4, 2.0, dtype) for dtype in ("f2", "f4", "f8", "c8", "c16")]
    assert gradclip.clip_by_norm_(grads, 2.0).norms.tolist() == [4.0] * 5
    try:
        gradclip.tensor_norms([object()])
    except TypeError as error:
        assert "grads[0]" in str(error)
    print("fine")
    """
    assert output_of(code) == "fine"


def test_public_names_at_import() -> None:
    code = "import gradclip; print(all(hasattr(gradclip, name) for name in gradclip.__all__))"
    assert output_of(code) == "True"


def test_threads_default_to_the_affinity_of_the_process() -> None:
    assert output_of(_THREADS) == str(len(os.sched_getaffinity(0)))
    one = f"import os; os.sched_setaffinity(0, [{min(os.sched_getaffinity(0))}]); {_THREADS}"
    assert output_of(one) == "1"


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"GRADCLIP_NUM_THREADS": "3"}, "3"),
        ({"OMP_NUM_THREADS": "5"}, "5"),
        ({"GRADCLIP_NUM_THREADS": "2", "OMP_NUM_THREADS": "5"}, "2"),
        ({"GRADCLIP_NUM_THREADS": "1"}, "1"),
        ({"GRADCLIP_NUM_THREADS": "1024"}, "1024"),
        ({"GRADCLIP_NUM_THREADS": " 3\n"}, "3"),
        ({"GRADCLIP_NUM_THREADS": "", "OMP_NUM_THREADS": " 5 "}, "5"),
        ({"GRADCLIP_NUM_THREADS": "  ", "OMP_NUM_THREADS": "5,2"}, "5"),
        ({"OMP_NUM_THREADS": "\t5 , 2"}, "5"),
    ],
)
def test_thread_variables(variables: dict[str, Any], expected: str) -> None:
    assert output_of(_THREADS, **variables) == expected


@pytest.mark.parametrize("bad", ["two", "0", "-1", "2.5", "1025", "99999999999999999999", "2x"])
def test_misspelt_thread_variable(bad: str) -> None:
    done = run_python("import gradclip; gradclip.global_norm([])", GRADCLIP_NUM_THREADS=bad)
    assert done.returncode != 0
    assert done.returncode > 0
    last = done.stderr.strip().splitlines()[-1]
    assert all(part in last for part in ("GRADCLIP_NUM_THREADS", bad, "expected")), done.stderr


@pytest.mark.parametrize("bad", ["", "two", "-1"])
def test_another_library_s_variable_never_breaks_the_import(bad: str) -> None:
    """OMP_NUM_THREADS is OpenMP's to complain about."""
    assert int(output_of(_THREADS, OMP_NUM_THREADS=bad)) >= 1


@pytest.mark.parametrize("value", ["", " ", "\t"])
def test_variables_set_to_nothing_are_not_set(value: str) -> None:
    unset = output_of(f"{_THREADS}; {_ISA}")
    assert output_of(f"{_THREADS}; {_ISA}", GRADCLIP_NUM_THREADS=value, GRADCLIP_ISA=value) == unset
    assert output_of(_ISA, GRADCLIP_ISA=f"{value}baseline ") == "baseline"


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_isa_variable(isa: str) -> None:
    """Forced where the machine has it, else an error that says what there is."""
    done = run_python(_ISA, GRADCLIP_ISA=isa)
    if isa in ISAS:
        assert (done.returncode, done.stdout.strip()) == (0, isa), done.stderr
    else:
        assert done.returncode > 0
        assert "GRADCLIP_ISA" in done.stderr
        assert isa in done.stderr


@pytest.mark.parametrize("bad", ["axv2", "AVX2", "neon", "avx-512", "native"])
def test_misspelt_isa_variable(bad: str) -> None:
    done = run_python("import gradclip; gradclip.global_norm([])", GRADCLIP_ISA=bad)
    assert done.returncode > 0
    last = done.stderr.strip().splitlines()[-1]
    assert all(part in last for part in ("GRADCLIP_ISA", bad, "expected", "baseline")), done.stderr


def test_the_best_isa_is_the_default() -> None:
    assert output_of(_ISA) == ISAS[0]
    assert ISAS[-1] == "baseline"


def test_set_isa() -> None:
    code = """
    from gradclip import _core
    for name in _core.supported_isas():
        _core.set_isa(name)
        assert _core.get_isa() == name
    try:
        _core.set_isa("sse9")
    except ValueError as error:
        assert "sse9" in str(error) and "baseline" in str(error)
        print("refused")
    """
    assert output_of(code) == "refused"


@pytest.mark.parametrize("measure", [False, True])
def test_info(measure: bool) -> None:
    """python -m gradclip info and show_config() print the same; bandwidths where they are asked for."""
    from_api = output_of(f"import gradclip; gradclip.show_config({measure})", GRADCLIP_NUM_THREADS="1")
    code = f"""
    import runpy, sys
    sys.argv = ["gradclip", "info", *["--measure"][:{measure:d}]]
    runpy.run_module("gradclip", run_name="__main__")
    """
    done = run_python(code, GRADCLIP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr
    for text in (from_api, done.stdout):
        assert ISAS[0] in text
        assert text.count("GB/s") == 2 * measure
        assert "threads" in text.lower()
        assert output_of("import gradclip; print(gradclip.__version__)") in text
