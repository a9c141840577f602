"""The C++ kernels of every instruction set against the float64 truth."""

import math
from dataclasses import replace

import pytest
import torch
from native_inputs import ISAS, run

from prefix_fast.testing import Case, check, make_problem, output_grads, truth

DTYPES = [torch.float32, torch.bfloat16, torch.float16]

# Blocks are 64 queries in groups of 16; key tiles are 64 (backward) and 128 (forward); vectors are 4 to 16 wide.
EDGES = [
    Case(B=2, H=2, Hkv=2, Tq=tokens, Tk=tokens, P=prefix, D=32)
    for tokens, prefix in [(1, 63), (15, 64), (16, 65), (17, 1), (63, 127), (64, 128), (65, 129), (130, 17)]
]
HEAD_DIMS = [Case(B=2, H=2, Hkv=1, Tq=33, Tk=33, P=20, D=dim) for dim in (1, 15, 17, 48, 64, 80, 96, 128, 200, 256)]
OPTIONS = [
    Case(B=9, H=4, Hkv=4, Tq=1, Tk=1, P=0, D=96),  # one key: the gradients of its score cancel
    Case(B=3, H=6, Hkv=2, Tq=40, Tk=70, P=30, D=64, N=3, ids="random", lengths="random"),
    Case(B=3, H=2, Hkv=2, Tq=70, Tk=40, P=30, D=16, query_offset="int"),
    Case(B=5, H=2, Hkv=2, Tq=30, Tk=80, P=9, D=16, query_offset="rows", key_mask="scattered"),
    Case(B=4, H=2, Hkv=1, Tq=70, Tk=70, P=9, D=32, key_mask="left"),
    Case(B=4, H=2, Hkv=1, Tq=70, Tk=70, P=9, D=32, key_mask="right", attn_bias=True, is_causal=False),
    Case(B=4, H=4, Hkv=2, Tq=70, Tk=70, P=40, D=32, N=2, packed=True, packed_segments=True, ids="random"),
    Case(B=2, H=2, Hkv=2, Tq=70, Tk=70, P=70, D=32, num_sets=2, dropout_p=0.25, key_mask="scattered"),
]
# Few queries a row: rows that read one segment share blocks of lanes; up to four have kernels of their own.
DECODING = [
    Case(B=70, H=2, Hkv=2, Tq=1, Tk=33, P=200, D=64),
    Case(B=9, H=8, Hkv=2, Tq=1, Tk=17, P=65, D=80, N=3, ids="random", lengths="random"),
    Case(B=9, H=4, Hkv=2, Tq=2, Tk=20, P=300, D=17, num_sets=2, key_mask="left", attn_bias=True),
    Case(B=12, H=2, Hkv=2, Tq=5, Tk=150, P=40, D=32, query_offset="rows", key_mask="scattered"),
    Case(B=12, H=4, Hkv=2, Tq=3, Tk=9, P=70, D=32, N=2, packed=True, packed_segments=True, ids="random"),
    Case(B=2, H=2, Hkv=2, Tq=1, Tk=200, P=30, D=33, key_mask="scattered", dropout_p=0.2),
    Case(B=20, H=2, Hkv=2, Tq=1, Tk=5, P=300, D=16, dropout_p=0.2),
]


@pytest.fixture(params=ISAS)
def isa(request, monkeypatch):
    monkeypatch.setenv("PREFIX_FAST_CPU_ISA", request.param)
    return request.param


@pytest.mark.parametrize("case", EDGES + HEAD_DIMS + OPTIONS + DECODING, ids=str)
def test_error_is_within_the_budget(case, isa):
    check(make_problem(case), "cpu")


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=["bf16", "fp16"])
@pytest.mark.parametrize("case", EDGES[3::4] + HEAD_DIMS[:4] + OPTIONS[1::2] + DECODING[:3], ids=str)
def test_error_is_within_the_budget_for_half_precision(case, dtype, isa):
    check(make_problem(replace(case, dtype=dtype)), "cpu")


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=["bf16", "fp16"])
def test_float32_segments_beside_half_precision_queries(dtype, isa):
    for tokens in (1, 20):
        check(make_problem(Case(B=9, Tq=tokens, Tk=20, P=70, D=32, dtype=dtype, prefix_dtype=torch.float32)), "cpu")


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16", "fp16"])
def test_large_scores_stay_exact(dtype, isa):
    """Scores of ±1e4: nearly every query has one key left, and nothing overflows."""
    for tokens in (1, 20):
        problem = make_problem(Case(B=9, Tq=tokens, Tk=20, P=30, D=16, dtype=dtype))
        problem = replace(problem, scale=3000.0)
        results, true = run(problem), truth(problem)
        torch.testing.assert_close(results["out"].double(), true["out"], atol=2e-2, rtol=2e-2)
        torch.testing.assert_close(results["lse"].double(), true["lse"], atol=1e-2, rtol=1e-6)
        assert all(tensor.isfinite().all() for tensor in results.values())


@pytest.mark.parametrize("bias", [-1e2, -1e4, -1e5, -1e6, -1e9, torch.finfo(torch.float32).min])
def test_rows_of_large_biases_alone_are_bounded(bias, isa):
    """Forward exact; backward, which has lse as one float32 number, off by its rounding, and by n - 1 times at most."""
    keys = 9
    problem = make_problem(Case(B=2, H=2, Hkv=2, Tq=5, Tk=keys, P=0, D=16, is_causal=False))
    equal = torch.zeros_like(problem.query)
    problem = replace(problem, query=equal, attn_bias=torch.full((2, 1, 5, keys), bias))
    found, true = run(problem), truth(problem, output_grads(problem))
    torch.testing.assert_close(found["out"].double(), true["out"], atol=1e-6, rtol=1e-5)
    rounding = min(math.expm1(min(2**-22 * abs(bias), 10.0)), keys - 1) + 1e-5
    for name in ("grad.query", "grad.value"):
        largest = float(true[name].abs().max())
        assert float((found[name].double() - true[name]).abs().max()) <= rounding * largest, name


@pytest.mark.parametrize("bias", [-1e9, torch.finfo(torch.float32).min])
def test_large_biases_beside_one_free_key_are_as_good_as_a_mask(bias, isa):
    """The usual padding: where a query sees any key without such a bias, the others weigh exactly nothing."""
    problem = make_problem(Case(B=4, H=2, Hkv=1, Tq=20, Tk=20, P=7, D=32, key_mask="scattered"))
    additive = torch.zeros(4, 1, 1, 20).masked_fill(~problem.key_mask[:, None, None], bias)
    biased = replace(problem, key_mask=None, attn_bias=additive.expand(4, 1, 20, 20))
    found, masked = run(biased), run(replace(problem, attn_bias=torch.zeros(4, 1, 20, 20)))
    for name, tensor in masked.items():
        torch.testing.assert_close(found[name], tensor, atol=1e-6, rtol=1e-5)
    hidden = ~problem.key_mask[:, None, :, None].expand_as(found["grad.key"])
    assert not found["grad.key"][hidden].any()
    assert not found["grad.value"][hidden].any()


def test_equal_scores_average_the_values(isa):
    for tokens in (1, 70):
        problem = make_problem(Case(B=9, Tq=tokens, Tk=70, P=100, D=16, is_causal=False))
        problem = replace(problem, query=torch.zeros_like(problem.query))
        values = torch.cat([problem.sets[0].value.expand(9, -1, -1, -1), problem.value], 2)
        expected = values.mean(2, keepdim=True).expand_as(problem.query)
        torch.testing.assert_close(run(problem, gradients=False)["out"], expected, atol=1e-6, rtol=1e-5)


def test_values_of_every_half_precision_number_survive(isa):
    """One visible key a query: out is its value, so each bfloat16 and float16 passes through both conversions."""
    for dtype in (torch.bfloat16, torch.float16):
        numbers = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype)
        numbers = numbers[numbers.isfinite()]
        if dtype == torch.bfloat16:  # below 2^-126 the float32 kernels may flush
            numbers = numbers[(numbers == 0) | (numbers.abs() >= 2.0**-126)]
        numbers = numbers[: numbers.numel() // 64 * 64].view(1, 1, -1, 64)
        tokens = numbers.shape[2]
        hidden = torch.full((tokens, tokens), -torch.inf).fill_diagonal_(0)
        problem = make_problem(Case(B=1, H=1, Hkv=1, Tq=tokens, Tk=tokens, P=0, D=64, dtype=dtype))
        problem = replace(problem, value=numbers, attn_bias=hidden.expand(1, 1, -1, -1))
        out = run(problem, gradients=False)["out"]
        assert torch.equal(out, numbers + 0.0)


def test_overflow_rounds_to_infinity_in_half_precision(isa):
    problem = make_problem(Case(B=1, H=1, Hkv=1, Tq=2, Tk=1, P=0, D=4, dtype=torch.float16, is_causal=False))
    problem = replace(
        problem, value=torch.tensor([65504.0, -65504.0, torch.inf, 1e-7], dtype=torch.float16).view(1, 1, 1, 4)
    )
    assert torch.equal(run(problem, gradients=False)["out"][0, 0, 1], problem.value[0, 0, 0])
