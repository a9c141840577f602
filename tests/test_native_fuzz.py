"""Random shapes and options through the C++ kernels of every instruction set, against the float64 truth."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from native_inputs import ISAS

from prefix_fast.testing import Case, check, make_problem

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LENGTHS = st.integers(0, 140)
FEW = st.integers(1, 6)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Ragged sizes on both sides of blocks, tiles and vectors; few queries a row as often as many."""
    heads_kv, group = draw(st.integers(1, 3)), draw(st.sampled_from([1, 1, 2, 3]))
    packed = draw(st.booleans())
    return Case(
        B=draw(st.integers(1, 12)),
        H=heads_kv * group,
        Hkv=heads_kv,
        Tq=draw(FEW | LENGTHS),
        Tk=draw(LENGTHS),
        N=draw(st.integers(1, 3)),
        P=draw(LENGTHS),
        D=draw(st.integers(1, 72) | st.sampled_from([80, 96, 128])),
        dtype=draw(st.sampled_from(DTYPES)),
        num_sets=draw(st.integers(0, 2)),
        packed=packed,
        packed_segments=draw(st.booleans()),
        ids="random",
        lengths=draw(st.sampled_from(["none", "random"])),
        key_mask="none" if packed else draw(st.sampled_from(["none", "left", "right", "scattered"])),
        attn_bias=False if packed else draw(st.booleans()),
        is_causal=draw(st.booleans()),
        query_offset=draw(st.sampled_from(["none", "int", "rows"])),
        dropout_p=draw(st.sampled_from([0.0, 0.0, 0.3])),
        seed=draw(st.integers(0, 2**20)),
    )


@pytest.mark.parametrize("isa", ISAS)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], database=None)
@given(case=cases())
def test_any_case_is_within_the_budget(isa: str, case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFIX_FAST_CPU_ISA", isa)
    check(make_problem(case), "cpu")
