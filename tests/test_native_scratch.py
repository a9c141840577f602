"""Memory of the C++ kernels beyond their tensors: how much, how long, and none that is new in a steady state.

The bounds are those that DESIGN.md states. D' is D rounded up to 16.
"""

import resource
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import pytest
import torch
from native_inputs import ISAS, run

from prefix_fast.backends import native
from prefix_fast.backends.problem import Grads
from prefix_fast.testing import Case, float_tensors, make_problem, output_grads

Result = TypeVar("Result")
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="/proc, and page faults of a thread, are Linux's")
MEBI = 1 << 20
# Every buffer that a thread can have is in use: dropout, softcap, masked keys, more than a tile of them, all gradients.
EVERYTHING = Case(
    B=2, H=2, Hkv=2, Tq=70, Tk=130, P=140, D=64, dropout_p=0.1, key_mask="scattered", options={"softcap": 2.0}
)


@pytest.fixture(params=ISAS)
def isa(request, monkeypatch):
    monkeypatch.setenv("PREFIX_FAST_CPU_ISA", request.param)
    return request.param


def padded(head_dim: int) -> int:
    return -(-head_dim // 16) * 16


def of_a_thread(head_dim: int) -> int:
    """Bytes of a thread's blocks of 64 queries and tiles of keys."""
    return 4 * (832 * padded(head_dim) + 70 * 1024)


def of_own_gradients(case: Case) -> int:
    """Bytes of a thread's sums over a row's own keys, where they cannot be taken in the gradient itself."""
    in_place = case.dtype == torch.float32 and case.D % 16 == 0
    return 0 if in_place else 8 * case.Tk * padded(case.D) + 8192


def held() -> int:
    """Bytes of scratch of all threads, once those that have ended are gone: they free it after Python's join."""
    module, before = native.extension(), -1
    while before != (now := module.scratch_bytes()):
        before = now
        time.sleep(0.05)
    return now


def on_a_new_thread(action: Callable[[], Result]) -> Result:
    results = []
    thread = threading.Thread(target=lambda: results.append(action()))
    thread.start()
    thread.join()
    return results[0]


def added_by(action: Callable[[], object]) -> int:
    """Bytes of scratch that a thread without any holds after the action."""
    before = held()

    def measured() -> int:
        action()
        return native.extension().scratch_bytes() - before

    return on_a_new_thread(measured)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("head_dim", [1, 64, 80, 128, 257])
def test_a_thread_holds_what_is_stated(head_dim, dtype, isa):
    torch.set_num_threads(1)
    case = replace(EVERYTHING, D=head_dim, dtype=dtype, num_sets=0)
    added = added_by(lambda: run(make_problem(case)))
    assert 0 < added <= of_a_thread(head_dim) + of_own_gradients(case)


def test_partial_sums_of_the_backward_are_those_of_the_chunks_of_lanes(isa):
    torch.set_num_threads(1)
    case = Case(B=33, H=2, Hkv=2, Tq=300, Tk=1, P=1000, D=16)
    added = added_by(lambda: run(make_problem(case)))
    chunks = -(-case.B * case.Tq * case.H // case.Hkv // 256)
    stated = chunks * case.Hkv * case.P * 2 * case.D * 4
    assert stated / 2 < added <= stated + of_a_thread(case.D)


def test_partial_states_of_the_forward_are_those_of_the_chunks(isa):
    torch.set_num_threads(1)
    case = Case(B=64, H=1, Hkv=1, Tq=4, Tk=1, P=2000, D=64)
    added = added_by(lambda: run(make_problem(case), gradients=False))
    chunks = -(-case.P // 256) + 1  # and the rows' own tokens
    stated = chunks * case.B * case.Tq * case.H * (case.D + 2) * 4
    assert 0 < added <= stated + of_a_thread(case.D)


def prepared(case: Case) -> Callable[[], None]:
    """Forward and backward of a call whose tensors are all there."""
    problem = make_problem(case)
    out, lse = torch.zeros_like(problem.query), torch.zeros(problem.query.shape[:-1])
    given, grads = output_grads(problem), {name: torch.zeros_like(t) for name, t in float_tensors(problem).items()}
    wanted = Grads(grads["query"], grads["key"], grads["value"], ((grads["segment0.key"], grads["segment0.value"]),))

    def call() -> None:
        native.forward(problem, out, lse)
        native.backward(problem, out, lse, *given, wanted)

    return call


def test_peak_of_resident_memory_is_what_is_stated():
    """A process grows by no more than the scratch that is counted: nothing else of size is taken in between."""
    program = """
        import torch
        from test_native_scratch import MEBI, Case, Path, native, of_a_thread, of_own_gradients, padded, prepared

        def resident(field):
            lines = Path("/proc/self/status").read_text().splitlines()
            return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))

        torch.set_num_threads(1)
        case = Case(B=32, H=2, Hkv=2, Tq=260, Tk=200, P=2000, D=33)
        call = prepared(case)
        before = resident("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        call()
        growth, scratch = resident("VmHWM") - before, native.extension().scratch_bytes()
        sums = case.B * case.Hkv * case.P * 2 * padded(case.D) * 4  # rows of more than 256 lanes
        assert scratch / 2 < growth <= sums + of_a_thread(case.D) + of_own_gradients(case) + MEBI, (growth, scratch)
    """
    source = f"import sys; sys.path.append({str(Path(__file__).parent)!r})\n{textwrap.dedent(program)}"
    subprocess.run([sys.executable, "-I", "-c", source], check=True, timeout=120)


@pytest.mark.parametrize("case", [EVERYTHING, Case(B=64, H=4, Hkv=4, Tq=1, Tk=70, P=600, D=64)], ids=str)
def test_a_steady_state_allocates_nothing(case, isa):
    """No buffer grows and no page is touched for the first time; what is left are the plan's small vectors."""
    torch.set_num_threads(1)
    call, module = prepared(case), native.extension()
    for _ in range(3):
        call()
    allocations, faults = module.scratch_allocations(), resource.getrusage(resource.RUSAGE_THREAD).ru_minflt
    for _ in range(20):
        call()
    assert module.scratch_allocations() == allocations
    assert resource.getrusage(resource.RUSAGE_THREAD).ru_minflt - faults < 20


def test_scratch_does_not_grow_with_the_number_of_calls(isa):
    """A hundred calls of many shapes on three threads hold no more than the largest needs."""
    torch.set_num_threads(3)
    start = held()
    for seed in range(100):
        run(make_problem(Case(B=1 + seed % 5, Tq=1 + 7 * (seed % 11), Tk=80, P=3 * seed, D=16 * (1 + seed % 4))))
    sums = 16 * 4 * 300 * 2 * 64 * 4
    assert held() - start <= 3 * of_a_thread(64) + sums


def test_what_a_huge_call_took_goes_back(isa):
    """Own keys whose sums are over the 32 MiB that a buffer may keep."""
    torch.set_num_threads(1)
    case = Case(B=1, H=1, Hkv=1, Tq=1, Tk=200_000, P=0, D=33, query_offset="int")
    added = added_by(lambda: run(make_problem(case)))
    assert of_own_gradients(case) > 2 * 32 * MEBI
    assert 0 < added <= of_a_thread(case.D)


@pytest.mark.slow
def test_partial_sums_of_a_huge_call_go_back(isa):
    """Over the 256 MiB that a call may keep: rows that each read a long segment, whose sums need whole vectors."""
    torch.set_num_threads(1)
    case = Case(B=128, H=1, Hkv=1, Tq=1, Tk=1, N=128, P=8200, D=17, ids="random")
    problem = make_problem(case)
    problem = replace(problem, sets=(replace(problem.sets[0], ids=torch.arange(case.N)),))
    assert case.N * case.P * 2 * padded(case.D) * 4 > 256 * MEBI
    assert 0 < added_by(lambda: run(problem)) <= of_a_thread(case.D) + of_own_gradients(case)


@pytest.mark.parametrize("team", [1, 2])
def test_threads_that_end_give_their_scratch_back(team, isa):
    """Six callers at once hold what six teams need, and nothing once they and their pools are gone."""
    torch.set_num_threads(team)
    start, problem = held(), make_problem(EVERYTHING)
    together = threading.Barrier(7, timeout=60)

    def caller() -> None:
        run(problem)
        together.wait()
        together.wait()

    threads = [threading.Thread(target=caller) for _ in range(6)]
    for thread in threads:
        thread.start()
    together.wait()
    busy = native.extension().scratch_bytes() - start
    together.wait()
    for thread in threads:
        thread.join()
    assert 0 < busy <= 6 * team * of_a_thread(EVERYTHING.D)
    deadline = time.monotonic() + 20
    while held() > start and time.monotonic() < deadline:
        pass
    assert held() <= start
