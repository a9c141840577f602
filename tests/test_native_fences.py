"""Not one byte beyond a tensor is read or written, on either side, by any instruction set."""

import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from fenced_memory import fenced, fenced_problem
from native_inputs import ISAS, assert_same_bits, run

from prefix_fast.testing import Case, make_problem

pytestmark = pytest.mark.skipif(os.name != "posix", reason="mprotect is POSIX's")

CAPPED = {"window": 40, "in_window": True, "softcap": 2.0, "sinks": True}
# One row of queries and keys more and less than whole blocks, tiles and vectors; each kind of argument once.
SHAPES = [
    Case(B=2, H=2, Hkv=1, Tq=33, Tk=65, P=66, N=2, ids="random", lengths="random"),
    Case(B=2, H=2, Hkv=2, Tq=7, Tk=131, P=129, key_mask="scattered", attn_bias=True),
    Case(B=9, H=4, Hkv=2, Tq=2, Tk=19, P=131, key_mask="left", query_offset="rows"),
    Case(B=9, H=2, Hkv=2, Tq=1, Tk=5, P=261, key_mask="scattered", attn_bias=True, num_sets=2),
    Case(B=3, H=2, Hkv=2, Tq=70, Tk=70, P=20, N=2, packed=True, packed_segments=True, ids="random"),
    Case(B=2, H=2, Hkv=1, Tq=17, Tk=17, P=3, dropout_p=0.2, is_causal=False),
    Case(B=2, H=2, Hkv=1, Tq=33, Tk=70, P=67, attn_bias=True, options={**CAPPED, "segment_bias": True}),
    Case(B=9, H=4, Hkv=2, Tq=1, Tk=19, P=67, N=2, ids="random", options={**CAPPED, "segment_bias": True}),
]
HEAD_DIMS = [1, 7, 15, 16, 17, 24, 33, 64, 80]
DTYPES = [(torch.float32, None), (torch.bfloat16, None), (torch.float16, None), (torch.bfloat16, torch.float32)]


def cases():
    for shape in SHAPES:
        for head_dim in HEAD_DIMS:
            for dtype, prefix_dtype in DTYPES:
                yield replace(shape, D=head_dim, dtype=dtype, prefix_dtype=prefix_dtype)


def check_between_fences() -> None:
    """All cases in this process, which a touch of a fence would end."""
    for case in cases():
        print(case, flush=True)
        problem = make_problem(case)
        expected = run(problem)
        for side in ("start", "end"):
            found = run(fenced_problem(problem, side), place=lambda tensor, side=side: fenced(tensor, side))
            assert_same_bits(found, expected)


def in_a_process(program: str, **environment: str) -> subprocess.CompletedProcess:
    source = f"import sys; sys.path.append({str(Path(__file__).parent)!r})\n{program}"
    command = [sys.executable, "-I", "-c", source]
    return subprocess.run(command, capture_output=True, text=True, timeout=500, env=os.environ | environment)


@pytest.mark.parametrize("isa", ISAS)
def test_nothing_beyond_a_tensor_is_touched(isa):
    program = "import test_native_fences; test_native_fences.check_between_fences()"
    done = in_a_process(program, PREFIX_FAST_CPU_ISA=isa)
    last = done.stdout.splitlines()[-1:]
    assert done.returncode == 0, f"ended with {done.returncode} in {last}\n{done.stderr}"
    assert len(done.stdout.splitlines()) == len(list(cases()))


@pytest.mark.parametrize(("side", "at"), [("start", "-1"), ("end", "t.numel() * 4")])
def test_a_touched_fence_ends_the_process(side, at):
    program = f"import ctypes, torch; from fenced_memory import fenced; t = fenced(torch.ones(3, 5), '{side}')\n"
    inside, beyond = (f"ctypes.string_at(t.data_ptr() + {where}, 1)" for where in ("7", at))
    assert in_a_process(program + inside).returncode == 0
    assert in_a_process(program + beyond).returncode in (-signal.SIGSEGV, -signal.SIGBUS)
