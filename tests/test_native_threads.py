"""How the C++ kernels cut their work: enough of it for 64 threads, the same for any number, and the bits with it."""

import heapq
from dataclasses import replace

import pytest
import torch
from native_inputs import ISAS, assert_same_bits, run

from prefix_fast.backends import native
from prefix_fast.testing import Case, make_problem

MEBI = 1 << 20
TRAINING = Case(B=8, H=12, Hkv=12, Tq=128, Tk=128, P=200, D=64)
DECODING = Case(B=64, H=12, Hkv=12, Tq=1, Tk=64, P=1024, D=64)
# (case, pass, least busy share of 8 threads, of 64). Items of less than a million multiply-adds, 20 µs of a core, would
# not pay for their threads: small calls leave some of 64 idle.
BALANCE = [
    (TRAINING, "forward", 0.95, 0.85),
    (TRAINING, "backward", 0.95, 0.7),
    (replace(TRAINING, Tq=512, Tk=512), "backward", 0.95, 0.7),
    (replace(TRAINING, P=1024), "backward", 0.95, 0.7),
    (replace(TRAINING, B=1, Tq=512, Tk=512), "forward", 0.95, 0.65),
    (replace(TRAINING, B=1, Tq=512, Tk=512), "backward", 0.9, 0.5),
    (replace(TRAINING, B=1, Tq=512, Tk=512, P=2048), "backward", 0.95, 0.8),
    (replace(TRAINING, Hkv=1, Tq=512, Tk=512), "forward", 0.95, 0.85),
    (replace(TRAINING, Hkv=1, Tq=512, Tk=512), "backward", 0.95, 0.7),
    (replace(TRAINING, B=64, Tq=8, Tk=8, P=512), "forward", 0.95, 0.7),
    (replace(TRAINING, B=64, Tq=8, Tk=8, P=512), "backward", 0.95, 0.7),
    (replace(TRAINING, B=16, Tq=512, Tk=512, packed=True), "forward", 0.95, 0.85),
    (replace(TRAINING, B=16, Tq=512, Tk=512, packed=True), "backward", 0.95, 0.7),
    (replace(TRAINING, B=64, N=64, P=2048, ids="random", lengths="random"), "backward", 0.95, 0.7),
    (DECODING, "forward", 0.95, 0.7),
    (replace(DECODING, B=1, P=8192), "forward", 0.95, 0.85),
    (replace(DECODING, B=1, P=8192), "backward", 0.95, 0.7),
    (replace(DECODING, B=1, H=8, Hkv=1, P=65536, D=128), "forward", 0.95, 0.85),
    (replace(DECODING, B=8, H=8, Hkv=1, P=16384, D=128), "forward", 0.95, 0.8),
    (replace(DECODING, N=64, P=2048, ids="random", lengths="random"), "forward", 0.95, 0.85),
]  # fmt: skip


def seconds(costs: list[int], threads: int) -> int:
    """When the last of `threads` is done, each of which takes the next item as soon as it is free."""
    free = [0] * threads
    for cost in costs:
        heapq.heapreplace(free, free[0] + cost)
    return max(free)


def busy_share(phases: list[list[int]], threads: int) -> float:
    """Part of the threads' time that is work, when they wait for each other between phases."""
    return sum(map(sum, phases)) / (threads * sum(seconds(phase, threads) for phase in phases))


def partition(case: Case, which: str) -> list[list[int]]:
    return native.extension().partition(make_problem(case), which)


@pytest.mark.parametrize(("case", "which", "eight", "sixty_four"), BALANCE, ids=lambda value: str(value))
def test_threads_are_busy(case, which, eight, sixty_four):
    phases = partition(case, which)
    assert busy_share(phases, 1) == 1
    assert busy_share(phases, 2) >= 0.97
    assert busy_share(phases, 8) >= eight
    assert busy_share(phases, 64) >= sixty_four


@pytest.mark.parametrize("case", [TRAINING, DECODING], ids=str)
@pytest.mark.parametrize("which", ["forward", "backward"])
def test_costs_are_the_multiply_adds_of_the_call(case, which):
    """No less than the visible pairs need, and no more than blocks of 16 lanes and their sums cost beside them."""
    shared, own = case.Tq * case.P, sum(min(case.Tk, i + case.Tk - case.Tq + 1) for i in range(case.Tq))
    products = 2 if which == "forward" else 5
    phases = partition(case, which)
    found = sum(map(sum, phases))
    needed = products * case.B * case.H * case.D * (shared + own)
    assert found >= needed
    assert found <= 2.1 * needed
    assert bool(phases[0]) == (case.Tq == 1)  # rows of one query fold


def test_partition_of_an_unknown_pass_raises():
    with pytest.raises(ValueError, match="expected forward or backward, got sideways"):
        partition(TRAINING, "sideways")


@pytest.mark.parametrize(
    "case",
    [replace(TRAINING, B=2, Tq=2048, Tk=2048, P=8192), replace(TRAINING, B=1, Tq=8192, Tk=8192, P=0),
     replace(TRAINING, B=64, Hkv=1, P=8192), replace(TRAINING, Tq=512, Tk=512, P=4096)],
    ids=str,
)  # fmt: skip
def test_parts_of_gradients_stay_within_their_memory(case):
    """Each of the last phase's multiply-adds is one float of one part, or of the gradient."""
    floats = sum(partition(case, "backward")[2])
    assert floats * 4 <= 2 * 128 * MEBI + 8 * case.Hkv * case.D * (case.P + case.B * case.Tk)


# Rows split into pieces, rows folded over chunks of keys, both beside sets that are walked, and half precision.
CUT = [
    Case(B=1, H=2, Hkv=2, Tq=300, Tk=310, P=40, D=32),
    Case(B=1, H=6, Hkv=1, Tq=90, Tk=100, P=1100, D=16, key_mask="scattered"),
    Case(B=3, H=4, Hkv=2, Tq=150, Tk=150, P=70, D=20, N=2, ids="random", lengths="random", query_offset="rows"),
    Case(B=3, H=2, Hkv=2, Tq=300, Tk=200, P=70, D=32, packed=True, packed_segments=True, N=2, ids="random"),
    Case(B=50, H=2, Hkv=1, Tq=3, Tk=5, P=600, D=48, num_sets=2, N=3, ids="random", lengths="random"),
    Case(B=30, H=2, Hkv=2, Tq=9, Tk=9, P=300, D=64, dtype=torch.bfloat16, dropout_p=0.2),
    Case(B=2, H=2, Hkv=2, Tq=200, Tk=200, P=1100, D=32, dtype=torch.bfloat16),
]  # fmt: skip


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("case", CUT, ids=str)
def test_cut_work_gives_the_bits_of_one_thread(case, isa, monkeypatch):
    monkeypatch.setenv("PREFIX_FAST_CPU_ISA", isa)
    problem = make_problem(case)
    torch.set_num_threads(1)
    expected = run(problem)
    for threads in (2, 7):
        torch.set_num_threads(threads)
        assert_same_bits(run(problem), expected)
