"""The C++ kernels beside other threads and processes: callers, parallel regions, forks, workers."""

import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from native_inputs import ISAS, assert_same_bits, run

from prefix_fast.backends import native
from prefix_fast.backends.problem import Grads
from prefix_fast.testing import Case, make_problem

# Forward and backward, with and without rows that share blocks of queries, in small and large.
CASES = [
    Case(B=6, H=4, Hkv=2, Tq=70, Tk=70, P=130, D=32, N=3, ids="random", lengths="random", key_mask="left"),
    Case(B=40, H=4, Hkv=2, Tq=1, Tk=30, P=300, D=64, N=2, ids="random", lengths="random"),
    Case(B=2, H=2, Hkv=2, Tq=9, Tk=40, P=300, D=17, key_mask="scattered", num_sets=2),
    Case(B=3, H=8, Hkv=8, Tq=40, Tk=40, P=20, D=96, dtype=torch.bfloat16),
    Case(B=9, H=2, Hkv=1, Tq=130, Tk=130, P=0, D=128),
    Case(B=1, H=1, Hkv=1, Tq=1, Tk=1, P=1, D=1),
    Case(B=16, H=2, Hkv=2, Tq=33, Tk=33, P=65, D=48, dtype=torch.float16, dropout_p=0.2),
    Case(B=4, H=4, Hkv=2, Tq=70, Tk=70, P=40, D=80, N=2, packed=True, packed_segments=True, ids="random"),
]


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("team", [1, 2])
def test_eight_callers_at_once_get_the_bits_of_one(isa, team, monkeypatch):
    monkeypatch.setenv("PREFIX_FAST_CPU_ISA", isa)
    torch.set_num_threads(team)
    problems = [make_problem(case) for case in CASES]
    expected = [run(problem) for problem in problems]
    with ThreadPoolExecutor(len(problems)) as callers:
        for _ in range(3):
            for found, alone in zip(callers.map(run, problems), expected, strict=True):
                assert_same_bits(found, alone)


@pytest.mark.parametrize("threads", [0, -1])
def test_a_thread_count_below_one_raises(threads):
    problem = make_problem(Case())
    out, lse = torch.empty_like(problem.query), torch.empty(problem.query.shape[:-1])
    nothing = Grads(None, None, None, ((None, None),))
    module = native.extension()
    for call in (
        lambda: module.forward(problem, out, lse, threads),
        lambda: module.backward(problem, out, lse, out, None, nothing, threads),
    ):
        with pytest.raises(ValueError, match=rf"expected at least one thread, got {threads}; torch\.set_num_threads"):
            call()


def in_a_process(program: str) -> None:
    """Run it after a preamble in an interpreter of its own: a hang or a crash is a failure of this test alone."""
    preamble = """
        import os, sys, torch, warnings
        from prefix_fast import prefix_attention
        warnings.simplefilter("ignore")  # Python 3.12 warns of forks beside threads
        query = torch.randn(4, 8, 70, 32)
        prefix = torch.randn(1, 8, 20, 32)

        def call():
            own = query.clone().requires_grad_()
            shared = prefix.clone().requires_grad_()
            out = prefix_attention(own, own, own, shared, shared, backend="cpu")
            return out.detach(), *torch.autograd.grad(out, (own, shared), torch.ones_like(out))

        def same(found, expected):
            return all(bool((f.numpy() == e.numpy()).all()) for f, e in zip(found, expected, strict=True))

        torch.set_num_threads(2)
        expected = call()
    """
    source = textwrap.dedent(preamble) + textwrap.dedent(program)
    subprocess.run([sys.executable, "-I", "-c", source], check=True, timeout=120)


def test_forked_processes_and_their_threads_compute_the_same_bits():
    """The pool that the parent's thread has used does not exist in the child, which must not wait for it."""
    in_a_process("""
        import threading

        def in_child(threads, action):
            child = os.fork()
            if child == 0:
                # PyTorch's own regions would wait for the pool: they get one thread, the call its number of them.
                torch.set_num_threads(1)
                torch.get_num_threads = lambda: threads
                os._exit(0 if action() else 3)
            return os.waitpid(child, 0)[1] == 0

        def computes():
            return same(call(), expected)

        def computes_on_a_thread():
            results = []
            thread = threading.Thread(target=lambda: results.append(computes()))
            thread.start()
            thread.join()
            return results == [True]

        assert in_child(1, computes)
        assert in_child(2, computes)
        assert in_child(3, computes_on_a_thread)
        assert in_child(3, lambda: computes() and computes_on_a_thread())
        assert in_child(3, lambda: computes() and in_child(2, computes))
        assert computes()
    """)


def test_workers_of_a_data_loader_call_it():
    in_a_process("""
        class Calls(torch.utils.data.Dataset):
            def __len__(self):
                return 6

            def __getitem__(self, index):
                return same(call(), expected)

        loader = torch.utils.data.DataLoader(Calls(), batch_size=None, num_workers=2, multiprocessing_context="fork")
        assert list(loader) == [True] * 6
        assert same(call(), expected)
    """)


def test_calls_from_inside_a_parallel_region_compute_the_same_bits():
    """Every thread of an OpenMP team calls."""
    in_a_process("""
        import ctypes

        try:
            runtime = ctypes.CDLL("libgomp.so.1")  # the one that is loaded already
        except OSError:
            sys.exit(0)
        found = []

        @ctypes.CFUNCTYPE(None, ctypes.c_void_p)
        def region(_):
            found.append((runtime.omp_get_thread_num(), same(call(), expected)))

        for _ in range(5):
            runtime.GOMP_parallel(region, None, 3, 0)
        assert sorted(found) == sorted([(thread, True) for thread in range(3)] * 5), found
        assert same(call(), expected)
    """)
