"""What `import prefix_fast` costs and what it leaves alone; each import in a fresh process."""

import subprocess
import sys
from pathlib import Path

import pytest

ALLOWED_SECONDS = 0.2


def run(code: str, cwd: Path) -> str:
    """What the code prints in a fresh interpreter that finds the package only where it is installed."""
    done = subprocess.run([sys.executable, "-I", "-c", code], cwd=cwd, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("package", ["transformers", "triton", "peft", "datasets", "typer", "matplotlib", "kernels"])
def test_import_leaves_package_alone(package: str, tmp_path: Path) -> None:
    # What torch itself imports does not count.
    code = (
        "import sys, torch; before = set(sys.modules); import prefix_fast; "
        f"print(sorted(m for m in set(sys.modules) - before if m.split('.')[0] == {package!r}))"
    )
    assert run(code, tmp_path) == "[]"


def test_import_costs_little_beyond_torch(tmp_path: Path) -> None:
    code = "import time, torch; t = time.perf_counter(); import prefix_fast; print(time.perf_counter() - t)"
    # A busy machine can delay any one try, but only a costly import delays all.
    assert any(float(run(code, tmp_path)) < ALLOWED_SECONDS for _ in range(6))


def test_every_public_name_resolves(tmp_path: Path) -> None:
    code = "import prefix_fast; print([n for n in prefix_fast.__all__ if getattr(prefix_fast, n, None) is None])"
    assert run(code, tmp_path) == "[]"


def test_unknown_name_is_an_attribute_error(tmp_path: Path) -> None:
    code = "import prefix_fast\ntry: prefix_fast.no_such_name\nexcept AttributeError as error: print(error)"
    assert "no_such_name" in run(code, tmp_path)
