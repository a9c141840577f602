"""What the installed distribution says of itself."""

import importlib.metadata
import re
from pathlib import Path


def test_installed_version_is_the_declared_one(root: Path) -> None:
    declared = re.search(r'^version = "(.+)"$', (root / "pyproject.toml").read_text("utf-8"), re.MULTILINE)
    assert declared is not None
    assert importlib.metadata.version("prefix-fast") == declared[1]


def test_command_resolves() -> None:
    (entry,) = importlib.metadata.entry_points(group="console_scripts", name="prefix-fast")
    assert callable(entry.load())


def test_constraints_pin_every_direct_requirement(root: Path) -> None:
    pinned = set(re.findall(r"^([\w-]+)==", (root / "constraints.txt").read_text("utf-8"), re.MULTILINE))
    required = {
        re.split(r"[<>=!~;\s\[]", line, maxsplit=1)[0] for line in importlib.metadata.requires("prefix-fast") or []
    }
    assert required <= pinned
    assert "torch" in required


def test_build_needs_no_torch(root: Path) -> None:
    requires = re.search(r"^requires = \[(.+)\]$", (root / "pyproject.toml").read_text("utf-8"), re.MULTILINE)
    assert requires is not None
    names = {re.split(r"[<>=]", name.strip(' "'))[0] for name in requires[1].split(",")}
    assert names == {"setuptools", "pybind11", "ninja"}
