"""Our top-level folder `kernels` is never taken for the Hugging Face package that transformers probes for."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

FIND = (
    "import importlib.util, pathlib; spec = importlib.util.find_spec('kernels'); print(spec.origin if spec else None)"
)


def ours(origin: str | None, root: Path) -> bool:
    """Whether a module's file lies in this checkout's kernels folder."""
    return origin is not None and Path(origin).resolve().parent == root / "kernels"


def test_kernels_is_not_ours_under_pytest(root: Path) -> None:
    spec = importlib.util.find_spec("kernels")
    assert not ours(spec.origin if spec else None, root)


def test_kernels_is_not_ours_for_a_script(root: Path, tmp_path: Path) -> None:
    # A script's own folder leads sys.path, as that of the `prefix-fast` command does, wherever it is started.
    script = tmp_path / "script.py"
    script.write_text(FIND)
    done = subprocess.run([sys.executable, script], cwd=root, capture_output=True, text=True, check=True)
    assert not ours(done.stdout.strip(), root)


def test_kernels_is_not_ours_isolated(root: Path) -> None:
    # -I, as in every command of the Makefile.
    done = subprocess.run([sys.executable, "-I", "-c", FIND], cwd=root, capture_output=True, text=True, check=True)
    assert not ours(done.stdout.strip(), root)


def test_check_sees_ours_when_it_leads_the_path(root: Path) -> None:
    # The bare -c puts the checkout on sys.path: the case that the others must not be.
    done = subprocess.run([sys.executable, "-c", FIND], cwd=root, capture_output=True, text=True, check=True)
    assert ours(done.stdout.strip(), root)


def exposing(text: str) -> list[str]:
    """The commands of a text that put the working directory on sys.path: -m and -c without -I or -P."""
    command = re.compile(r"\bpython[\d.]*(?P<options>(?: -[A-Za-z]+)*?) -[mc] (?!pip|venv)")
    matches = ((line, command.search(line)) for line in text.splitlines())
    return [line.strip() for line, match in matches if match and not re.search(" -[IP]", match["options"])]


def test_documented_commands_keep_the_checkout_off_the_path(root: Path) -> None:
    for name in ("README.md", "CONTRIBUTING.md", "Makefile", ".ci/run"):
        assert exposing((root / name).read_text("utf-8")) == [], name


@pytest.mark.parametrize(
    ("command", "found"),
    [
        ("python -m prefix_fast.demo", True),
        (".venv/bin/python3.12 -m pytest tests", True),
        ("python -c 'import prefix_fast'", True),
        ("python -I -m pytest", False),
        ("$(BIN)/python -I -m mypy", False),
        ("python -m pip install -e .", False),
        ("python3 -m venv .venv", False),
        ("prefix-fast doctor", False),
    ],
)
def test_exposing_command_is_found(command: str, found: bool) -> None:
    assert bool(exposing(command)) is found


def test_command_starts_in_the_checkout(root: Path) -> None:
    command = Path(sys.executable).with_name("prefix-fast")
    done = subprocess.run([command, "--help"], cwd=root, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "doctor" in done.stdout
