"""_cuda.pyi against the module, which stubtest cannot import where there is no CUDA compiler."""

from __future__ import annotations

import ast
import importlib
import re
from pathlib import Path
from typing import Any

import gradclip


def _signatures(body: list[ast.stmt]) -> dict[str, list[str]]:
    return {
        node.name: [argument.arg for argument in node.args.args]
        for node in body
        if isinstance(node, ast.FunctionDef) and not node.decorator_list
    }


def _parameters(function: Any) -> list[str]:
    """The names in a signature that pybind11 wrote: "f(self: ..., grads: object) -> int"."""
    signature = str(function.__doc__).splitlines()[0].rpartition(" -> ")[0]
    return re.findall(r"[(,] ?(\w+): ", re.sub(r"\[[^()]*?\]", "", signature))


def test_the_stub_of_the_cuda_module() -> None:
    stub = ast.parse((Path(gradclip.__file__).parent / "_cuda.pyi").read_text())
    module = importlib.import_module("gradclip._cuda_emulated")
    functions = _signatures(stub.body)
    assert len(functions) >= 8
    for name, parameters in functions.items():
        assert _parameters(getattr(module, name)) == parameters, name
    classes = {node.name: node for node in stub.body if isinstance(node, ast.ClassDef)}
    for name in ("Gradients", "Pair", "Measured"):
        bases = [classes[base.id] for base in classes[name].bases if isinstance(base, ast.Name)]
        body = [line for node in (*bases, classes[name]) for line in node.body]
        real = getattr(module, name)
        for method, parameters in _signatures(body).items():
            if method != "__len__":  # of which pybind11 says "arg0"
                assert _parameters(getattr(real, method)) == parameters, f"{name}.{method}"
        public = {member for member in vars(real) if not member.startswith("_")}
        assert public <= {node.name for node in body if isinstance(node, ast.FunctionDef)}
