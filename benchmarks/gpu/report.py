"""What was measured, as JSON and as Markdown, with all that the figures depend on."""

from __future__ import annotations

import platform
import shutil
import subprocess
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

CLOCKS = "name,driver_version,clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,power.limit,temperature.gpu"


@dataclass(frozen=True)
class Result:
    """One contender on one shape. `error` is why there are no times: it raised, or its results differ from ours."""

    shape: str
    mode: str  # "forward" or "forward + backward"
    contender: str
    ours: bool = False
    median_seconds: float | None = None
    fastest_seconds: float | None = None
    ratio: float | None = None  # its median over ours
    difference: float | None = None  # from ours, as a part of the largest value
    error: str | None = None


def machine(device: str) -> dict[str, Any]:
    """Card, clocks, driver and versions."""
    facts: dict[str, Any] = {"python": platform.python_version(), "cuda": torch.version.cuda, "hip": torch.version.hip}
    if device.startswith("cuda"):
        properties = torch.cuda.get_device_properties(device)
        facts["card"] = properties.name
        facts["multiprocessors"] = properties.multi_processor_count
        facts["memory_bytes"] = properties.total_memory
    for package in ("torch", "triton", "flashinfer-python", "transformers"):
        try:
            facts[package] = version(package)
        except PackageNotFoundError:
            facts[package] = None
    return facts | {"nvidia-smi": nvidia_smi()}


def nvidia_smi() -> dict[str, str] | None:
    """Clocks, limits and the driver's version of the first card; None where the tool is missing or fails."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    command = [tool, f"--query-gpu={CLOCKS}", "--format=csv,noheader", "--id=0"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        return None
    return dict(zip(CLOCKS.split(","), (part.strip() for part in done.stdout.strip().split(",")), strict=False))


def as_json(facts: dict[str, Any], results: list[Result]) -> dict[str, Any]:
    """All facts and figures."""
    return {"machine": facts, "results": [asdict(result) for result in results]}


def as_markdown(results: list[Result]) -> str:
    """A table with a line for each contender."""
    lines = [
        "| shape | | contender | median | × ours | difference |",
        "|---|---|---|--:|--:|--:|",
    ]
    for result in results:
        figures = (
            f"{_time(result.median_seconds)} | {_number(result.ratio, '.2f')} | {_number(result.difference, '.0e')}"
        )
        if result.error is not None:
            figures = f"{result.error.splitlines()[0][:80].replace('|', '/')} | – | {_number(result.difference, '.0e')}"
        name = f"**{result.contender}**" if result.ours else result.contender
        lines.append(f"| {result.shape} | {result.mode} | {name} | {figures} |")
    return "\n".join(lines)


def _time(seconds: float | None) -> str:
    return "–" if seconds is None else f"{1e6 * seconds:.1f} µs" if seconds < 1e-2 else f"{1e3 * seconds:.2f} ms"


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)
