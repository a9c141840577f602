"""The cost model of the C++ kernels counts what the kernels do, and predicts what they take."""

import itertools
import re
from pathlib import Path

import costs
import pytest
import torch
from costs import Case, shape_of

from prefix_fast.backends import native, native_cost
from prefix_fast.backends.native_cost import COSTS, Machine, Work
from prefix_fast.backends.shapes import Shape
from prefix_fast.prediction import label

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
MACHINE = Machine("avx512", 1, 1e11, 0.0, 6e9, ((1 << 20, 1e11), (1 << 24, 4e10), (1 << 27, 2e10)), 2e-5, 1e-5)
LEVELS = [pytest.param(level, id=level) for level in native.available_isas()]
SHAPES = [
    *(shape_of(8, T, T, P) for T, P in ((128, 200), (33, 50), (512, 10))),
    *(shape_of(B, 1, 64, 1024) for B in (1, 3, 64)),
    shape_of(1, 128, 128, 4096),
    shape_of(5, 7, 20, 300, (32, 8, 128)),
    Shape(12, 4, 2, 9, 9, 64, 4, ((3, 70), (1, 500))),
]


def brute_force_keys(shape: Shape) -> list[int]:
    """The own keys that some lane of each group sees, lane by lane."""
    group, visible = shape.heads // shape.kv_heads, torch.ones(shape.queries, shape.keys, dtype=torch.bool)
    if shape.causal:
        visible = visible.tril(shape.keys - shape.queries)
    seen = visible.sum(1).repeat_interleave(group).tolist()
    return [max(seen[first : first + 16]) for first in range(0, len(seen), 16)]


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (5, 5), (16, 16), (33, 33), (3, 40), (40, 3), (64, 0)])
@pytest.mark.parametrize("group", [1, 3, 4])
def test_own_keys_are_those_that_the_mask_shows(queries: int, keys: int, group: int, causal: bool) -> None:
    shape = Shape(2, 2 * group, 2, queries, keys, 16, 4, ((1, 7),), causal)
    assert native_cost.own_keys(shape) == brute_force_keys(shape)


@pytest.mark.parametrize("shape", SHAPES, ids=label)
def test_exponentials_are_the_visible_pairs_in_whole_groups_of_lanes(shape: Shape) -> None:
    """Counted from the masks: each group of 16 lanes of a row, or of a segment's readers, walks its keys once."""
    own = 16 * sum(brute_force_keys(shape)) * shape.rows * shape.kv_heads
    lanes = shape.queries * shape.heads // shape.kv_heads
    forward, backward = native_cost.forward_work(shape), native_cost.backward_work(shape)
    for work, folds in ((forward, native_cost.folds_forward), (backward, native_cost.folds_backward)):
        shared = 0
        for count, size in shape.sets:
            readers = shape.rows // count
            units = count * -(-readers * lanes // 16) if folds(shape, count, size) else shape.rows * -(-lanes // 16)
            shared += 16 * units * size * shape.kv_heads
        few = work is forward and lanes <= 4  # then own keys, and a lone row's prefix, take the other path
        expected = own * (not few) + shared * (not few or shape.rows * lanes > 4)
        assert sum(phase.weights for phase in work) == expected
        assert sum(phase.products for phase in work) == expected * shape.head_dim * (4 if work is forward else 10)
        assert expected == 0 or expected >= shape.pairs * shape.heads * (not few)


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=label)
def test_phases_are_those_of_the_kernels(shape: Shape, backward: bool) -> None:
    """A phase has work exactly where the kernels cut items for it, and in the same proportion to the other phases."""
    work = (native_cost.backward_work if backward else native_cost.forward_work)(shape)
    partition = native.extension().partition(native_cost.problem_of(shape), "backward" if backward else "forward")
    assert len(partition) == len(work)
    for phase, items in zip(work, partition, strict=True):
        assert (phase.total > 0) == bool(items)
        flop, cut = phase.products + phase.few, 2 * sum(items)
        if flop > 0 and phase.few == 0:
            assert flop <= 1.01 * cut  # which counts whole blocks up to their last query
            assert flop >= 0.7 * cut


def test_sizes_are_those_of_the_sources(root) -> None:
    text = "\n".join(file.read_text("utf-8") for file in sorted((root / "csrc" / "cpu").glob("*.*")))
    found = {}
    for name, value in re.findall(r"constexpr (?:int|int64_t) (k\w+) = ([^;]+);", text):
        if name in native_cost.SIZES:
            expression = re.sub(r"int64_t\{(\d+)\}", r"\1", value).replace("kGroup * kGroups", "16 * 4")
            assert name not in found
            found[name] = eval(expression)
    assert found == native_cost.SIZES


def seconds(shape: Shape, machine: Machine = MACHINE, dtype: torch.dtype = torch.float32) -> tuple[float, float]:
    return (
        native_cost.forward_seconds(machine, shape, dtype),
        native_cost.backward_seconds(machine, shape, dtype),
    )


@pytest.mark.parametrize("heads", [costs.GPT2, costs.LLAMA])
@pytest.mark.parametrize(("B", "Tq", "Tk"), [(8, 128, 128), (64, 1, 64), (1, 1, 64), (2, 20, 20)])
def test_times_grow_with_the_prefix(B: int, Tq: int, Tk: int, heads: tuple[int, int, int]) -> None:
    """Within one way of cutting: a longer prefix may be cut otherwise, which costs something before it gains."""
    last = {}
    for P in (1, 10, 31, 64, 200, 511, 512, 1000, 1024, 2048, 4096):
        shape = shape_of(B, Tq, Tk, P, heads)
        cut = (native_cost.folds_forward(shape, 1, P), native_cost.folds_backward(shape, 1, P))
        for index, time in enumerate(seconds(shape)):
            assert time > last.get((index, cut), 0.0)
            last[index, cut] = time


@pytest.mark.parametrize("threads", [2, 8, 64])
@pytest.mark.parametrize("shape", SHAPES, ids=label)
def test_threads_divide_the_work_and_never_more_than_that(shape: Shape, threads: int) -> None:
    many = MACHINE._replace(threads=threads, multiply_adds=1e11 * threads, exponentials=6e9 * threads, region=0.0)
    many = many._replace(bandwidths=tuple((size, rate * threads) for size, rate in many.bandwidths))
    for one, several in zip(seconds(shape), seconds(shape, many), strict=True):
        assert one / threads <= several * 1.001
        assert several <= one * 1.001


def test_busiest_thread_has_the_most_of_what_was_taken_in_turn() -> None:
    assert native_cost.busiest_share([4, 4, 4], 2) == 8 / 12
    assert native_cost.busiest_share([5, 3, 1, 1], 2) == 0.5
    assert native_cost.busiest_share([7], 8) == 1.0
    assert native_cost.busiest_share([], 2) == 1.0


def test_bandwidth_passes_through_the_measured_sizes_and_falls_between_them() -> None:
    assert [MACHINE.bandwidth(size) for size, _ in MACHINE.bandwidths] == pytest.approx([1e11, 4e10, 2e10])
    rates = [MACHINE.bandwidth(size) for size in (1, 1 << 20, 3 << 20, 1 << 24, 1 << 25, 1 << 27, 1 << 40)]
    assert rates == sorted(rates, reverse=True)
    assert rates[0] == pytest.approx(1e11) and rates[-1] == pytest.approx(2e10)


@pytest.mark.parametrize("level", LEVELS)
def test_rates_of_every_level_are_measured_and_priced(level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFIX_FAST_CPU_ISA", level)
    torch.set_num_threads(1)
    machine = native_cost.measure(rounds=2)
    assert machine.level == level and machine.threads == 1 and machine.region == 0.0
    rates = (machine.multiply_adds, machine.exponentials, *(rate for _, rate in machine.bandwidths))
    assert all(1e7 < rate < 1e13 for rate in rates)
    assert machine.multiply_adds > 4 * machine.exponentials  # a degree-5 polynomial: at least 10 FLOP
    assert 1e-7 < machine.overhead < 1e-2
    assert (machine.pair_multiply_adds > 0) == (level == "avx512_bf16")
    for dtype in FLOATS:
        assert machine.arithmetic(dtype) in COSTS
        assert all(time > 0 for time in seconds(SHAPES[0], machine, dtype))


def test_costs_are_found_again_from_times_that_they_made() -> None:
    known = Work(1.2, 0.0, 1.5, 40.0, 3.0, 90.0, 0.8, 5.0)
    limits = [case.limits(MACHINE) for case in costs.cases(torch.float32)]
    times = [part.times(known).total for part in limits]
    times[3] *= 10  # a spoilt one
    assert costs.fit(limits, times) == pytest.approx(known, rel=0.02, abs=0.02)


def test_fitted_lines_replace_those_of_the_table_and_no_others(tmp_path) -> None:
    source = Path(native_cost.__file__).read_text("utf-8")
    copy = tmp_path / "table.py"
    copy.write_text(source, "utf-8")
    costs.write_table({name: costs.table_line(name, known) for name, known in COSTS.items()}, copy)
    assert copy.read_text("utf-8") == source
    costs.write_table({"avx2": costs.table_line("avx2", Work(1.5, 2))}, copy)
    changed = [line for line in copy.read_text("utf-8").splitlines() if line not in source.splitlines()]
    assert changed == ['    "avx2": Work(1.5, 2, 0, 0, 0, 0, 0, 0),']
    with pytest.raises(AssertionError, match="has 0 lines of avx1024"):
        costs.write_table({"avx1024": ""}, copy)


CHECKED = [
    *itertools.product(
        [shape_of(8, 128, 128, 10), shape_of(4, 128, 128, 200), shape_of(1, 128, 128, 1024), shape_of(1, 512, 512, 200),
         shape_of(2, 128, 128, 200, (12, 12, 128)), shape_of(1, 128, 128, 200)],
        (False, True),
    ),
    (shape_of(64, 1, 64, 1024), False), (shape_of(1, 1, 64, 1024), False),
    (shape_of(32, 1, 64, 1024, costs.LLAMA), False),
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("level", LEVELS)
def test_predictions_are_within_a_quarter_of_measured_times(
    level: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One thread's own processor time, the least of visits that go on while a busy machine spoils some of them."""
    monkeypatch.setenv("PREFIX_FAST_CPU_ISA", level)
    torch.set_num_threads(1)
    cases = [Case(shape, dtype, backward) for shape, backward in CHECKED]
    least: dict[Case, float] = {}
    for _ in range(12):
        machine = native_cost.measure()
        for case in cases:
            least[case] = min(least.get(case, float("inf")), costs.least_seconds(costs.run_of(case), 0.1))
        away = {str(case): case.predicted(machine) / least[case] - 1 for case in cases}
        if all(abs(error) <= 0.25 for error in away.values()):
            return
    pytest.fail(f"{native.chosen_isa()}: { ({name: f'{e:+.0%}' for name, e in away.items() if abs(e) > 0.25}) }")
