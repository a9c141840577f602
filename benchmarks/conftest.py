"""Options, the machine's facts, and at the end the table of ratios and the picture."""

import os
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
from compare import Row, machine, machine_line, table
from limits import rates, rates_line

ROWS = pytest.StashKey[list[Row]]()
PICTURE = Path(__file__).resolve().parent.parent / "docs" / "benchmarks.png"


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--quick` and `--plot [FILE]`."""
    group = parser.getgroup("prefix_fast")
    group.addoption("--quick", action="store_true", help="small shapes, one round: shows that the benchmarks run")
    group.addoption(
        "--plot",
        nargs="?",
        const=str(PICTURE),
        metavar="FILE",
        help="draw the ratios (docs/benchmarks.png), and beside them roofline.png",
    )


def pytest_configure(config: pytest.Config) -> None:
    """An empty list of rows."""
    config.stash[ROWS] = []


@pytest.fixture
def quick(request: pytest.FixtureRequest) -> bool:
    """Whether to show only that a benchmark runs."""
    return request.config.getoption("--quick")


@pytest.fixture
def record(request: pytest.FixtureRequest) -> Any:
    """Takes the rows of a comparison for the table."""
    return request.config.stash[ROWS].extend


@pytest.fixture(autouse=True)
def _same_start() -> None:
    """Fixed seeds, and float32 products in float32 for all contenders."""
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("highest")


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    """The facts that a figure depends on, for the JSON."""
    machine_info["prefix_fast"] = {**machine(), "rates": rates()}


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """The table, and with `--plot` the picture."""
    rows = config.stash[ROWS]
    if not rows:
        return
    facts, named = machine(), rates()
    terminalreporter.section("ratios: the rival's time over ours, fastest rounds, interleaved")
    for line in (machine_line(facts), rates_line(named), "", *table(rows)):
        terminalreporter.line(line)
    if config.getoption("--plot"):
        from plot import draw, draw_roofline

        path = Path(config.getoption("--plot"))
        roofline = path.with_name("roofline.png")
        draw([row for row in rows if row.headline], machine_line(facts), path)
        draw_roofline(rows, named, machine_line(facts), roofline)
        terminalreporter.line(f"\npictures: {path}, {roofline}")
