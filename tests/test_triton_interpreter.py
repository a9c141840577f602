"""The Triton kernels under Triton's interpreter against the oracle; each run is a process that begins with it on."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


def interpreted(root: Path, *arguments: str | Path) -> str:
    """What a Python process prints in which the interpreter runs Triton kernels."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-I", *map(str, arguments)], cwd=root, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("first", range(0, 20, 10))
def test_random_calls_agree_with_the_oracle(first: int, root: Path) -> None:
    assert "0 failures" in interpreted(root, root / "tests" / "triton_cases.py", str(first), str(first + 10))


@pytest.mark.slow
@pytest.mark.parametrize("first", range(20, 260, 40))
def test_many_random_calls_agree_with_the_oracle(first: int, root: Path) -> None:
    assert "0 failures" in interpreted(root, root / "tests" / "triton_cases.py", str(first), str(first + 40))


def test_properties_of_the_operator_hold(root: Path) -> None:
    _properties(
        root, "triton and not budget and (leaks or unused or no_key or smallest or large) or bitwise or same_on"
    )


@pytest.mark.slow
@pytest.mark.parametrize("chosen", ["fp32", "half_precision", "not budget"])
def test_every_property_of_the_operator_holds(chosen: str, root: Path) -> None:
    _properties(root, f"({chosen}) and not reference")


def _properties(root: Path, chosen: str) -> None:
    file = root / "tests" / "test_operator_properties.py"
    options = ("-q", "-p", "no:cacheprovider", "-p", "no:benchmark", "-p", "no:xdist", "-k", chosen)
    assert " passed" in interpreted(root, "-m", "pytest", *options, file)


def test_cpu_tensors_need_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from prefix_fast import dispatch
    from prefix_fast.backends.problem import Facts

    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    facts = Facts("cpu", torch.float64, 300, ())
    reasons = " ".join(dispatch.unsupported_reasons("triton", facts))
    for part in ("not float64", "up to 256, not 300", "only with TRITON_INTERPRET=1"):
        assert part in reasons
