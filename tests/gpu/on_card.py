"""Runs the tests, or a script, on this machine's CUDA or ROCm device from a bare checkout: nothing is installed.

    on_card.py test [--jobs N] [pytest arguments]
    on_card.py run SCRIPT [arguments]

Exits with 2 where there is no device. The package is put on the path through links, so that `prefix_fast.kernels` is
found and the checkout itself, whose `kernels` shadows another package of that name, is not on the path.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
NO_DEVICE, NO_TESTS = 2, 5  # exit codes; the second is pytest's


def missing_device() -> str | None:
    """Why nothing can run here; None: it can."""
    try:
        import torch
    except ImportError as error:
        return f"expected torch in the environment of {sys.executable}, got {error}; pass PY=PYTHON with torch"
    if not torch.cuda.is_available():
        return f"no CUDA or ROCm device is visible to torch {torch.__version__}, so nothing was run"
    return None


def link_package(folder: Path) -> None:
    """Make `folder` hold the package `prefix_fast` of this checkout, with its kernels."""
    package = folder / "prefix_fast"
    package.mkdir()
    for entry in (ROOT / "prefix_fast").iterdir():
        if entry.name != "__pycache__":
            (package / entry.name).symlink_to(entry)
    (package / "kernels").symlink_to(ROOT / "kernels")


def run_tests(arguments: list[str], environment: dict[str, str]) -> int:
    """The self-check of every configuration, whose tiles the other tests then use, and those tests; in N processes."""
    jobs = min(8, os.cpu_count() or 1)
    if "--jobs" in arguments:
        place = arguments.index("--jobs")
        jobs = int(arguments[place + 1])
        del arguments[place : place + 2]
    vetting, others = HERE / "test_selfcheck.py", HERE
    first = run_shards([str(vetting)], jobs, environment)
    return first or run_shards([str(others), f"--ignore={vetting}", *arguments], jobs, environment)


def run_shards(arguments: list[str], jobs: int, environment: dict[str, str]) -> int:
    """Run pytest in so many processes, each on its share of the tests; print their output one after another."""
    # No cache: several processes would write it. Not in the checkout: it would be on the path.
    options = ("-q", "-c", HERE / "pytest.ini", f"--rootdir={ROOT}", "-p", "no:cacheprovider", "-p", "no:benchmark")
    worst = 0
    with tempfile.TemporaryDirectory() as folder:
        logs = [Path(folder) / f"shard{number}.log" for number in range(jobs)]
        processes = []
        for number, log in enumerate(logs):
            command = [sys.executable, "-m", "pytest", *options, f"--shard={number}/{jobs}", *arguments]
            with log.open("w") as output:
                processes.append(
                    subprocess.Popen(
                        list(map(str, command)), cwd=folder, env=environment, stdout=output, stderr=subprocess.STDOUT
                    )
                )
        for number, (process, log) in enumerate(zip(processes, logs, strict=True)):
            code = process.wait()
            print(f"== {Path(arguments[0]).name}, process {number + 1} of {jobs}")
            print(log.read_text(errors="replace"), flush=True)
            worst = max(worst, 0 if code == NO_TESTS else abs(code))
    return worst


def main(arguments: list[str]) -> int:
    """Run what the first argument says. Returns the exit code."""
    reason = missing_device()
    if reason is not None:
        sys.stderr.write(f"on_card: {reason}\n")
        return NO_DEVICE
    with tempfile.TemporaryDirectory() as folder:
        link_package(Path(folder))
        path = os.pathsep.join(filter(None, (folder, os.environ.get("PYTHONPATH"))))
        environment = {**os.environ, "PYTHONPATH": path}
        if arguments[:1] == ["test"]:
            environment.setdefault("PREFIX_FAST_CACHE", str(Path(folder) / "cache"))
            return run_tests(arguments[1:], environment)
        if arguments[:1] == ["run"] and len(arguments) > 1:
            return subprocess.run([sys.executable, *arguments[1:]], env=environment, check=False).returncode
    sys.stderr.write(f"{__doc__}\n")
    return NO_DEVICE


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
