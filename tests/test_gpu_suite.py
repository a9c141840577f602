"""The tests of tests/gpu cannot rot where there is no device: they are collected, and run in Triton's interpreter."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
HERE = Path(__file__).resolve().parent
RUNNER = HERE / "gpu" / "on_card.py"
RUN_ELSEWHERE = {"test_properties", "test_cuda"}  # by test_triton_interpreter; the CUDA kernels by the emulator


def run_pytest(*arguments: str | Path, **environment: str) -> subprocess.CompletedProcess:
    """pytest in a process of its own, with the settings of tests/gpu."""
    options = ("-q", "-c", HERE / "gpu" / "pytest.ini", f"--rootdir={HERE.parent}", "-p", "no:cacheprovider")
    plugins = ("-p", "no:benchmark", "-p", "no:xdist")
    command = [sys.executable, "-I", "-m", "pytest", *options, *plugins, *arguments]
    clean = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(
        list(map(str, command)), env={**clean, "OMP_NUM_THREADS": "1", **environment}, capture_output=True, text=True
    )


@pytest.fixture(scope="module")
def runner():
    spec = importlib.util.spec_from_file_location("on_card", RUNNER)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_gpu_test_is_collected() -> None:
    done = run_pytest("--collect-only", HERE / "gpu")
    assert done.returncode == 0, done.stdout + done.stderr
    files = {line.split("::")[0] for line in done.stdout.splitlines() if "::" in line}
    assert files == {f"tests/gpu/{file.name}" for file in (HERE / "gpu").glob("test_*.py")}
    for expected in ("test_random_call[159]", "[D256-bf16]", "test_a_captured_graph", "test_strides_do_not_matter"):
        assert expected in done.stdout


def test_the_ordinary_run_leaves_them_out() -> None:
    options = (
        "-q",
        "-p",
        "no:benchmark",
        "-p",
        "no:cacheprovider",
        "--collect-only",
        f"--ignore-glob={HERE}/test_*.py",
    )
    done = subprocess.run(
        [sys.executable, "-I", "-m", "pytest", *options], cwd=HERE.parent, capture_output=True, text=True
    )
    assert "no tests collected" in done.stdout, done.stdout + done.stderr


def test_shards_share_out_all_tests() -> None:
    spec = importlib.util.spec_from_file_location("gpu_conftest", HERE / "gpu" / "conftest.py")
    conftest = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(conftest)
    items = [SimpleNamespace(number=number, get_closest_marker=lambda name: None) for number in range(10)]
    numbers = []
    for shard in range(3):
        share = list(items)
        conftest.pytest_collection_modifyitems(SimpleNamespace(getoption=lambda name, i=shard: f"{i}/3"), share)
        assert len(share) in (3, 4)
        numbers += [item.number for item in share]
    assert sorted(numbers) == list(range(10))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device")
def test_without_a_device_nothing_passes_in_silence() -> None:
    done = subprocess.run([sys.executable, RUNNER, "test"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "no CUDA or ROCm device is visible to torch" in done.stderr
    direct = run_pytest(HERE / "gpu" / "test_model.py")
    assert direct.returncode == 2 and "no CUDA or ROCm device" in direct.stdout + direct.stderr


def test_a_bare_checkout_is_importable_without_the_kernels_of_another_name(runner, tmp_path: Path) -> None:
    runner.link_package(tmp_path)
    program = (
        "import importlib.util, prefix_fast, prefix_fast.kernels.primitives as p; "
        "print(prefix_fast.__file__, p.__file__, importlib.util.find_spec('kernels'))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    package = tmp_path / "prefix_fast"
    assert done.stdout.split() == [str(package / "__init__.py"), str(package / "kernels" / "primitives.py"), "None"], (
        done
    )


def test_the_runner_passes_arguments_and_reports_failures(runner, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(runner, "missing_device", lambda: None)
    script = tmp_path / "script.py"
    script.write_text("import sys, prefix_fast; sys.exit(6 if sys.argv[1] not in prefix_fast.__file__ else 1)")
    assert runner.main(["run", str(script), str(HERE.parent)]) == 6
    calls = []
    monkeypatch.setattr(runner, "run_shards", lambda arguments, jobs, environment: calls.append((arguments, jobs)) or 0)
    assert runner.main(["test", "--jobs", "3", "-k", "sync"]) == 0
    (vetting, jobs), (others, _) = calls
    assert jobs == 3 and vetting[0].endswith("test_selfcheck.py") and others[-2:] == ["-k", "sync"]
    assert runner.main(["unheard"]) == 2 and "on_card.py test" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted({file.stem for file in (HERE / "gpu").glob("test_*.py")} - RUN_ELSEWHERE))
def test_gpu_tests_pass_in_the_interpreter(name: str) -> None:
    done = run_pytest(HERE / "gpu" / f"{name}.py", TRITON_INTERPRET="1")
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout + done.stderr
