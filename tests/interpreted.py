"""Processes that begin with Triton's interpreter on, and run kernels, programs or cases of the tests in it."""

import os
import subprocess
import sys
from pathlib import Path

_WITH_TESTS = "import sys; sys.path.insert(0, 'tests'); "
# pytest's options; "no:xdist" as the process may be a child of one of its workers.
_QUIET = ("-q", "-p", "no:cacheprovider", "-p", "no:benchmark", "-p", "no:xdist")


def run_python(root: Path, *arguments: object) -> str:
    """What a Python process prints in which the interpreter runs Triton kernels."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-I", *map(str, arguments)], cwd=root, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def run_module(root: Path, name: str, *arguments: object) -> str:
    """What the program `tests/<name>.py` prints under the interpreter."""
    start = f"{_WITH_TESTS}import {name}; sys.exit(min({name}.main(sys.argv[1:]), 1))"
    return run_python(root, "-c", start, *arguments)


def run_cases(root: Path, file: str, chosen: str, *options: str) -> None:
    """The tests of `tests/<file>` that the expression chooses, under the interpreter; some pass and none fails."""
    start = f"{_WITH_TESTS}import pytest; sys.exit(pytest.main(sys.argv[1:]))"
    printed = run_python(root, "-c", start, *_QUIET, *options, "-k", chosen, root / "tests" / file)
    assert " passed" in printed, printed
