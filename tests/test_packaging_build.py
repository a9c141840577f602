"""The sdist and the wheel hold what they should, and the wheel works in a clean environment; no network."""

import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

OPERATOR = """
import pathlib, sys
import torch, prefix_fast
from prefix_fast import prefix_attention

place = pathlib.Path(prefix_fast.__file__).parent.parent
assert place == pathlib.Path(sys.argv[1]), f"prefix_fast came from {place}"
query, key, value = (torch.randn(2, 4, 5, 16) for _ in range(3))
prefix_key, prefix_value = (torch.randn(1, 4, 3, 16, requires_grad=True) for _ in range(2))
results = {}
for backend in ("reference", "cpu"):
    out = prefix_attention(query, key, value, prefix_key, prefix_value, backend=backend)
    results[backend] = (out, *torch.autograd.grad(out.square().sum(), (prefix_key, prefix_value)))
for ours, expected in zip(results["cpu"], results["reference"]):
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)
import prefix_fast.kernels
print("works")
"""


def run(*command: object, cwd: Path) -> str:
    """The command's output; its whole log when it fails."""
    done = subprocess.run([str(part) for part in command], cwd=cwd, capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def checkout(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the sources without what a build has left in them."""
    copy = tmp_path_factory.mktemp("checkout") / "prefix_fast"
    left = shutil.ignore_patterns(
        ".*cache", ".git", ".venv*", "venv", "build", "dist", "*.egg-info", "*.so", "__pycache__"
    )
    shutil.copytree(root, copy, ignore=left)
    return copy


@pytest.fixture(scope="module")
def distributions(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The sdist, and the wheel built from that sdist."""
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-I", "-m", "build", "--no-isolation", "--outdir", folder, checkout, cwd=folder)
    (sdist,), (wheel,) = folder.glob("*.tar.gz"), folder.glob("*.whl")
    return sdist, wheel


def environment(folder: Path) -> tuple[Path, Path]:
    """(python, site-packages) of a new environment that borrows the packages of this one."""
    # pip and setuptools come from the lender too: those that venv brings can be too old for this pyproject.toml.
    run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder.parent)
    python = folder / "bin" / "python"
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site = Path(run(python, "-I", "-c", code, cwd=folder).strip())
    # A folder named in a .pth file joins sys.path; the .pth files inside that folder are not read.
    lender = dict.fromkeys((sysconfig.get_path("purelib"), sysconfig.get_path("platlib")))
    (site / "lender.pth").write_text("\n".join(lender) + "\n")
    return python, site


def install(python: Path, *what: object, cwd: Path) -> None:
    """pip install without dependencies, index or isolation."""
    options = ("--quiet", "--no-deps", "--no-index", "--no-build-isolation", "--ignore-installed")
    run(python, "-I", "-m", "pip", "install", *options, *what, cwd=cwd)


def test_sdist_holds_the_sources(distributions: tuple[Path, Path], root: Path) -> None:
    with tarfile.open(distributions[0]) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    sources = [
        str(file.relative_to(root))
        for folder in ("csrc", "kernels", "prefix_fast")
        for file in (root / folder).rglob("*")
        if file.is_file() and file.suffix not in {".so", ".pyc"}
    ]
    assert sorted(set(sources) - names) == []
    assert {"pyproject.toml", "setup.py", "README.md", "LICENSE", "constraints.txt", "Makefile"} <= names
    assert not [name for name in names if re.search(r"\.(so|o|pyc)$|__pycache__|\.venv", name)]


def test_wheel_holds_the_package_and_nothing_else(distributions: tuple[Path, Path], root: Path) -> None:
    with zipfile.ZipFile(distributions[1]) as archive:
        names = archive.namelist()
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"prefix_fast"}
    modules = {str(file.relative_to(root)) for file in (root / "prefix_fast").rglob("*.py")}
    modules |= {f"prefix_fast/kernels/{file.name}" for file in (root / "kernels").glob("*.py")}
    assert {name for name in names if name.endswith(".py")} == modules
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    native = [name for name in names if name.endswith(suffix)]
    assert len(native) >= 1
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_wheel_works_in_a_clean_environment(distributions: tuple[Path, Path], tmp_path: Path) -> None:
    python, site = environment(tmp_path / "env")
    install(python, distributions[1], cwd=tmp_path)
    assert run(python, "-I", "-c", OPERATOR, site, cwd=tmp_path).strip() == "works"
    assert "doctor" in run(python.with_name("prefix-fast"), "--help", cwd=tmp_path)


@pytest.mark.parametrize("options", [(), ("--editable",)], ids=["plain", "editable"])
def test_checkout_installs(options: tuple[str, ...], checkout: Path, tmp_path: Path) -> None:
    python, site = environment(tmp_path / "env")
    install(python, *options, checkout, cwd=tmp_path)
    place = checkout if options else site
    assert run(python, "-I", "-c", OPERATOR, place, cwd=tmp_path).strip() == "works"
