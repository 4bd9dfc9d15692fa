"""Imported before anything else: a subinterpreter, in which the engines would hang or crash, is refused."""

import importlib
import sys

# CPython's own, for a question that has no public answer.
_interpreters = importlib.import_module(
    "_interpreters" if sys.version_info >= (3, 13) else "_xxsubinterpreters"
)

if _interpreters.get_current() != _interpreters.get_main():
    raise ImportError(
        "gradclip: expected the main interpreter of the process, got a subinterpreter (under mod_wsgi set "
        "WSGIApplicationGroup %{GLOBAL})"
    )
