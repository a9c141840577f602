"""Times on a device: rounds in turns, each contender from an emptied L2, by the device's own clock."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

import torch

FLUSHED = 256 * 2**20  # bytes written before each run: several times the largest L2
AHEAD = 8_000_000  # cycles that the device sleeps while the host queues a run, so that launches are not timed


def interleaved_seconds(runs: Sequence[Callable[[], object]], rounds: int, device: str) -> list[list[float]]:
    """Seconds of each run in each round; one run of each comes before as a warm-up."""
    watch = _on_device if device.startswith("cuda") else _on_host
    buffer = torch.empty(FLUSHED if device.startswith("cuda") else 1, dtype=torch.uint8, device=device)
    seconds: list[list[float]] = [[] for _ in runs]
    for round_number in range(-1, rounds):
        for run, times in zip(runs, seconds, strict=True):
            buffer.zero_()
            elapsed = watch(run)
            if round_number >= 0:
                times.append(elapsed)
    return seconds


def _on_device(run: Callable[[], object]) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(AHEAD)
    begin.record()
    run()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1e3


def _on_host(run: Callable[[], object]) -> float:
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


def median(times: Sequence[float]) -> float:
    """The middle one."""
    return statistics.median(times)
