"""One comparison: parity first, then interleaved rounds of ours and of its rivals, then ratios of the fastest rounds.

pytest-benchmark times ours; before each of its rounds every rival runs and is timed once, and so is the machine's peak.
Whatever the machine does meanwhile, slow clocks or a busy neighbour, it does to all of them.
"""

import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar

import torch
from limits import Limits
from torch import Tensor

Run = Callable[[], tuple[Tensor, ...]]


@dataclass(frozen=True)
class Contender:
    """Something to time. `run` does one whole round and returns what must agree with ours.

    Args:
        name: as the table and the picture show it.
        run: one round.
        rounds: at most so many timed rounds, for a rival that takes long. None: as many as ours.
        same_task: False if it does less than ours, so that its results are not compared.
        check: a round without its random numbers, for the comparison of results. None: `run`.
    """

    name: str
    run: Run
    rounds: int | None = None
    same_task: bool = True
    check: Run | None = None

    def results(self) -> tuple[Tensor, ...]:
        """What must agree."""
        return (self.check or self.run)()


@dataclass(frozen=True)
class Row:
    """Ours against one rival on one case. Seconds are those of the fastest round; ratio is rival over ours.

    Where the case has limits: the FLOP of its visible pairs, the bytes of its tensors, the time that the cost model
    predicts, and the peak of the machine in FLOP a second, measured between the rounds.
    """

    group: str
    case: str
    ours: str
    rival: str
    ours_seconds: float
    rival_seconds: float
    error: float | None
    headline: bool
    notes: dict[str, Any] = field(default_factory=dict)
    flop: float | None = None
    bytes: float | None = None
    predicted_seconds: float | None = None
    peak: float | None = None
    derived: ClassVar[tuple[str, ...]] = ("ratio", "of_peak")

    @property
    def of_peak(self) -> float | None:
        """Ours as a part of the machine's peak."""
        return None if self.flop is None or self.peak is None else self.flop / self.ours_seconds / self.peak

    @property
    def ratio(self) -> float:
        """How many times longer the rival takes."""
        return self.rival_seconds / self.ours_seconds

    def as_dict(self) -> dict[str, Any]:
        """All fields and what follows from them, for JSON."""
        return {**asdict(self), **{name: getattr(self, name) for name in self.derived}}

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> "Row":
        """The row of `as_dict`."""
        return cls(**{name: value for name, value in fields.items() if name not in cls.derived})


def parity_error(ours: Sequence[Tensor], rival: Sequence[Tensor], tolerance: float, name: str) -> float:
    """The largest difference, as a part of the rival's largest value; AssertionError past the tolerance."""
    assert len(ours) == len(rival), f"{name} returns {len(rival)} results, ours {len(ours)}"
    error = 0.0
    for index, (mine, theirs) in enumerate(zip(ours, rival, strict=True)):
        assert mine.shape == theirs.shape, f"result {index}: {tuple(mine.shape)}, {name}: {tuple(theirs.shape)}"
        scale = max(theirs.double().abs().max().item(), torch.finfo(torch.float32).tiny)
        difference = (mine.double() - theirs.double()).abs().max().item() / scale
        assert difference <= tolerance, f"result {index} differs from {name} by {difference:.2e} of its size"
        error = max(error, difference)
    return error


def compare(
    benchmark: Any,
    *,
    group: str,
    case: str,
    ours: Contender,
    rivals: Sequence[Contender],
    rounds: int,
    tolerance: float,
    headlines: Sequence[str] = (),
    notes: dict[str, Any] | None = None,
    limits: Limits | None = None,
) -> list[Row]:
    """Check parity, time all in turn, and leave the rows in the benchmark's extra_info.

    The parity runs are the warm-up: the first run on fresh memory is up to several times slower.

    Args:
        benchmark: pytest-benchmark's fixture.
        group, case: what is compared, and on which shapes.
        ours, rivals: the contenders.
        rounds: timed rounds.
        tolerance: of the parity check, as a part of the rival's largest value.
        headlines: names of the rivals whose row belongs in the picture.
        notes: further figures of the comparison, for the rows.
        limits: what ours could reach on this machine.
    """
    expected = ours.results()
    errors = {
        rival.name: parity_error(expected, rival.results(), tolerance, rival.name)
        if rival.same_task
        else rival.run() and None
        for rival in rivals
    }
    del expected
    seconds: dict[str, list[float]] = {rival.name: [] for rival in rivals}
    peaks: list[float] = []

    def run_rivals() -> None:
        if limits is not None:
            peaks.append(limits.peak())
        for rival in rivals:
            if len(seconds[rival.name]) < (rival.rounds or rounds):
                start = time.perf_counter()
                rival.run()
                seconds[rival.name].append(time.perf_counter() - start)

    benchmark.group = group
    benchmark.pedantic(ours.run, setup=run_rivals, rounds=rounds, iterations=1)
    if benchmark.stats is None:  # --benchmark-disable: a run for its parity alone
        return []
    rows = [
        Row(
            group,
            case,
            ours.name,
            rival.name,
            min(benchmark.stats.stats.data),
            min(seconds[rival.name]),
            errors[rival.name],
            rival.name in headlines,
            notes or {},
            **({} if limits is None else limits.figures(max(peaks))),
        )
        for rival in rivals
    ]
    benchmark.extra_info["rows"] = [row.as_dict() for row in rows]
    benchmark.extra_info["rival_seconds"] = seconds
    return rows


def machine() -> dict[str, Any]:
    """What a figure depends on: the processor, threads, versions and the float32 setting."""
    cpu = platform.processor()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.split(":", 1)[1] for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        cpu = names[0].strip() if names else cpu
    return {
        "cpu": cpu,
        "instruction_set": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        **{name: version(name) for name in ("prefix-fast", "torch", "transformers", "peft")},
    }


def machine_line(facts: dict[str, Any]) -> str:
    """The facts of `machine` in one line."""
    versions = ", ".join(f"{name} {facts[name]}" for name in ("torch", "transformers", "peft"))
    return (
        f"{facts['cpu']} ({facts['instruction_set']}), {facts['threads']} threads, float32_matmul_precision "
        f"{facts['float32_matmul_precision']!r}, {versions}"
    )


def duration(seconds: float) -> str:
    """Seconds in a unit that leaves three digits."""
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds / 1e-6:.3g} µs"


def table(rows: Sequence[Row]) -> list[str]:
    """The rows as lines of text, rivals of one case together."""
    cells = [("case", "ours", "GFLOP/s", "of peak", "predicted", "rival", "rival's time", "ratio", "difference")]
    last = None
    for row in rows:
        case = f"{row.group} · {row.case}"
        extra = "".join(f", {name} {value}" for name, value in row.notes.items())
        cells.append(
            (
                *((case, duration(row.ours_seconds), *limit_cells(row)) if case != last else ("",) * 5),
                row.rival,
                duration(row.rival_seconds),
                f"{row.ratio:.2f}×",
                ("another task" if row.error is None else f"{row.error:.0e}") + extra,
            )
        )
        last = case
    widths = [max(len(line[column]) for line in cells) for column in range(len(cells[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in cells]


def limit_cells(row: Row) -> tuple[str, str, str]:
    """GFLOP/s, the part of the peak, the predicted time and how far it is from the measured one."""
    if row.flop is None or row.of_peak is None or row.predicted_seconds is None:
        return "", "", ""
    away = row.predicted_seconds / row.ours_seconds - 1
    rate = row.flop / row.ours_seconds / 1e9
    return f"{rate:.0f}", f"{row.of_peak:.0%}", f"{duration(row.predicted_seconds)} ({away:+.0%})"
