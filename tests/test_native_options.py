"""Window, softcap, sinks and biases of segments in the C++ kernels of every instruction set."""

from dataclasses import replace

import pytest
import torch
from native_inputs import ISAS, assert_same_bits, run

from prefix_fast.backends import native
from prefix_fast.testing import Case, check, float_tensors, make_problem, truth, with_float_tensors

ALL = {"window": 70, "in_window": True, "softcap": 2.0, "sinks": True, "segment_bias": True}
WINDOWS = [
    Case(B=2, H=2, Hkv=2, Tq=200, Tk=200, P=30, D=32, options={"window": window, "in_window": inside})
    for window, inside in [(1, False), (2, True), (16, False), (63, True), (64, False), (65, True), (129, True)]
]
CASES = [
    *WINDOWS,
    # Row-major: several sets, some of which leave the window; ragged rows, keys behind and ahead of the queries.
    Case(B=3, H=4, Hkv=2, Tq=90, Tk=150, P=80, D=48, num_sets=2, N=2, ids="random", lengths="random", options=ALL),
    Case(B=4, H=2, Hkv=1, Tq=70, Tk=100, P=40, D=17, query_offset="rows", key_mask="scattered", attn_bias=True,
         options=ALL),
    Case(B=3, H=2, Hkv=2, Tq=40, Tk=150, P=40, D=32, is_causal=False, query_offset="int", options=ALL),
    Case(B=4, H=4, Hkv=2, Tq=70, Tk=90, P=40, D=32, N=2, packed=True, packed_segments=True, ids="random",
         options={"window": 33, "in_window": True, "softcap": 2.0, "sinks": True}),
    Case(B=2, H=2, Hkv=2, Tq=70, Tk=70, P=70, D=32, dropout_p=0.25, key_mask="left", options=ALL),
    # Rows that share blocks of lanes: their windows differ in one block.
    Case(B=12, H=4, Hkv=2, Tq=5, Tk=150, P=300, D=32, query_offset="rows", N=2, ids="random", lengths="random",
         options={**ALL, "window": 250}),
    Case(B=20, H=2, Hkv=2, Tq=3, Tk=9, P=140, D=33, query_offset="rows", dropout_p=0.2, options=ALL),
    # Up to four queries a row.
    Case(B=70, H=2, Hkv=2, Tq=1, Tk=333, P=200, D=64, options={"window": 100, "in_window": True}),
    Case(B=9, H=8, Hkv=2, Tq=1, Tk=17, P=65, D=80, N=3, ids="random", lengths="random", options=ALL),
    Case(B=9, H=2, Hkv=1, Tq=2, Tk=200, P=30, D=17, num_sets=2, key_mask="left", attn_bias=True, options=ALL),
    Case(B=2, H=2, Hkv=2, Tq=1, Tk=300, P=30, D=33, key_mask="scattered", dropout_p=0.2, options=ALL),
]  # fmt: skip


@pytest.fixture(params=ISAS)
def isa(request, monkeypatch):
    monkeypatch.setenv("PREFIX_FAST_CPU_ISA", request.param)
    return request.param


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_error_is_within_the_budget(case, dtype, isa):
    check(make_problem(replace(case, dtype=dtype)), "cpu")


@pytest.mark.parametrize("softcap", [0.1, 1.0, 50.0, 1e6])
@pytest.mark.parametrize("scale", [1e-4, 0.2, 2.0])
def test_softcap_is_exact_from_its_linear_part_to_saturation(softcap, scale, isa):
    for tokens in (1, 33):
        problem = make_problem(Case(B=9, Tq=tokens, Tk=33, P=30, D=32, options={"softcap": softcap, "scale": scale}))
        check(problem, "cpu")


def test_one_capped_score_has_a_few_roundings(isa):
    """One key and no other: lse is softcap · tanh(score / softcap), for scores over nine decades."""
    softcap, scores = 3.0, torch.logspace(-6, 3, 4000)
    for tokens in (1, 4000):
        query = torch.cat([scores, -scores]).view(-1, 1, tokens, 1)
        rows = query.shape[0]
        problem = make_problem(Case(B=rows, H=1, Hkv=1, Tq=tokens, Tk=1, P=0, D=1, is_causal=False))
        problem = replace(problem, query=query, key=torch.ones_like(problem.key), softcap=softcap, scale=1.0)
        lse = run(problem, gradients=False)["lse"].double()
        expected = softcap * torch.tanh(query[..., 0].double() / softcap)
        # 1e-7: the logarithm of the sum, which is 1; the unit of the maximum is log2 and back.
        torch.testing.assert_close(lse, expected, rtol=8e-7, atol=1e-7)


def test_capped_scores_of_any_size_are_finite_and_a_nan_shows(isa):
    for tokens in (1, 20):
        problem = make_problem(Case(B=9, Tq=tokens, Tk=20, P=30, D=16, options={"softcap": 5.0, "scale": 1e30}))
        assert all(tensor.isfinite().all() for tensor in run(problem).values())
        problem.query[0, 0, 0, 0] = torch.nan
        results = run(problem)
        for name in ("out", "lse", "grad.query"):
            assert results[name][0, 0, 0].isnan().any()
        assert results["out"][1:].isfinite().all()


@pytest.mark.parametrize("tokens", [1, 5, 70])
def test_a_window_of_everything_is_no_window(tokens, isa):
    problem = make_problem(Case(B=9, Tq=tokens, Tk=70, P=300, D=32, N=2, ids="random"))
    inside = replace(problem, window=10**18, sets=tuple(replace(s, in_window=True) for s in problem.sets))
    assert_same_bits(run(inside), run(problem))


@pytest.mark.parametrize("tokens", [1, 5, 90])
def test_a_window_equals_the_bias_that_says_so(tokens, isa):
    problem = make_problem(Case(B=9, H=2, Hkv=2, Tq=tokens, Tk=90, P=100, D=32, options=ALL | {"segment_bias": False}))
    position = torch.arange(tokens)[:, None] + 90 - tokens
    bias = torch.zeros(tokens, 90).masked_fill(torch.arange(90) <= position - 70, -torch.inf)
    of_prefix = torch.zeros(tokens, 100).masked_fill(torch.arange(100) - 100 <= position - 70, -torch.inf)
    sets = (replace(problem.sets[0], bias=of_prefix, in_window=False),)
    found, expected = run(problem), run(replace(problem, window=None, attn_bias=bias, sets=sets))
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-5)


def test_keys_that_left_every_window_are_not_read(isa):
    """But for the few that share a step of keys with the first of a window."""
    for tokens in (1, 8, 40):
        problem = make_problem(Case(B=9, Tq=tokens, Tk=200, P=150, D=32, options={"window": 90, "in_window": True}))
        expected = run(problem)
        named = {name: tensor.clone() for name, tensor in float_tensors(problem).items()}
        behind = 200 - tokens - 90 - 4
        for name, tensor in named.items():
            if name != "query":
                tensor[:, :, : tensor.shape[2] if name.startswith("segment") else behind] = torch.nan
        found = run(with_float_tensors(problem, named))
        assert_same_bits(found, expected)
        assert not found["grad.segment0.key"].any()
        assert not found["grad.key"][:, :, : behind + 4].any()


def test_far_offsets_and_windows_do_not_overflow(isa):
    far = 2**63 - 1
    for tokens in (1, 20):
        problem = make_problem(Case(B=9, Tq=tokens, Tk=20, P=30, D=16, options={"in_window": True}))
        seen = run(replace(problem, query_offset=far))
        for hidden in (run(replace(problem, query_offset=far, window=7)), run(replace(problem, query_offset=-far))):
            assert all(tensor.isfinite().all() for name, tensor in hidden.items() if name != "lse")
        nothing = run(replace(problem, query_offset=far, window=7))
        assert not nothing["out"].any()
        assert (nothing["lse"] == -torch.inf).all()
        assert_same_bits(run(replace(problem, query_offset=20, window=far)), seen)


def test_sinks_take_weight_and_give_none_to_a_query_without_keys(isa):
    for tokens in (1, 40):
        problem = make_problem(Case(B=9, H=2, Hkv=2, Tq=tokens, Tk=40, P=0, D=32, key_mask="right"))
        problem.key_mask[:3] = False
        plain, far = run(problem), torch.tensor([-torch.inf, -1e30])
        assert_same_bits(run(replace(problem, sinks=far)), plain)
        results = run(replace(problem, sinks=torch.tensor([300.0, 1e30])))
        seen = results["lse"] != -torch.inf
        assert torch.equal(seen, plain["lse"] != -torch.inf)
        assert not seen[:3].any()
        assert not results["out"].any()
        torch.testing.assert_close(
            results["lse"][:, 0][seen[:, 0]], torch.full_like(plain["lse"], 300.0)[:, 0][seen[:, 0]]
        )
        assert all(tensor.isfinite().all() for name, tensor in results.items() if name != "lse")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
def test_sinks_and_biases_of_every_dtype_and_layout(dtype, isa):
    """Broadcast along each dimension, with keys apart or backwards in memory, beside float32 queries."""
    generator = torch.Generator().manual_seed(0)
    for tokens in (1, 5, 40):
        case = Case(B=9, H=2, Hkv=2, Tq=tokens, Tk=40, P=50, D=32)
        problem = replace(make_problem(case), sinks=torch.randn(4, generator=generator).to(dtype)[::2])
        for shape in [(50,), (tokens, 50), (2, 1, 50), (9, 1, 1, 1), (1, 2, tokens, 50), (9, 2, tokens, 50)]:
            bias = torch.randn(*shape[:-1], 2 * shape[-1], generator=generator).to(dtype)
            for laid_out in (bias[..., ::2], bias.transpose(0, -1).contiguous().transpose(0, -1)[..., : shape[-1]]):
                sets = (replace(problem.sets[0], bias=laid_out),)
                check(replace(problem, sets=sets), "cpu", gradients=tokens == 5)


@pytest.mark.parametrize("tokens", [1, 5, 40])
def test_a_segment_bias_of_the_smallest_number_is_no_mask(tokens, isa):
    """Equal weights where every key has it, also beside a sink of the same; none beside a key without."""
    lowest = torch.finfo(torch.float32).min
    problem = make_problem(Case(B=9, H=2, Hkv=2, Tq=tokens, Tk=0, P=50, D=32, is_causal=False))
    (s,) = problem.sets
    biased = replace(problem, sets=(replace(s, bias=torch.full((1, 50), lowest)),))
    mean = s.value.mean(2, keepdim=True).expand_as(problem.query)
    torch.testing.assert_close(run(biased)["out"], mean, rtol=1e-5, atol=1e-6)
    sunk = run(replace(biased, sinks=torch.full((2,), lowest)))["out"]
    torch.testing.assert_close(sunk, mean * 50 / 51, rtol=1e-5, atol=1e-6)
    free = torch.full((1, 50), lowest).index_fill(1, torch.tensor([7]), 0.0)
    found = run(replace(problem, sets=(replace(s, bias=free),)))["out"]
    assert torch.equal(found, s.value[:, :, 7:8].expand_as(found))


def test_gradients_without_those_of_scores_are_the_same(isa):
    """dV alone needs no slope of the softcap."""
    problem = make_problem(Case(B=3, H=2, Hkv=2, Tq=40, Tk=40, P=30, D=32, options=ALL))
    everything, alone = run(problem), run(problem, wanted=["value", "segment0.value"])
    assert torch.equal(alone["grad.value"], everything["grad.value"])
    assert torch.equal(alone["grad.segment0.value"], everything["grad.segment0.value"])


def test_a_softcap_far_above_the_scores_is_none(isa):
    problem = make_problem(Case(B=3, H=2, Hkv=2, Tq=40, Tk=40, P=30, D=32))
    for name, tensor in run(problem).items():
        found = run(replace(problem, softcap=1e6))[name]
        torch.testing.assert_close(found, tensor, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("which", ["forward", "backward"])
def test_a_window_leaves_work_out(which):
    """Costs are those of the keys inside: window + 64 queries of a block and the segment, not of all that is before."""
    case = Case(B=1, H=8, Hkv=8, Tq=4096, Tk=4096, P=0, D=64, num_sets=0, options={"window": 256})
    costs = [sum(sum(phase) for phase in native.extension().partition(make_problem(c), which)[:2])
             for c in (case, replace(case, options={}))]  # fmt: skip
    assert costs[0] < costs[1] * (256 + 64) / (4096 / 2)


def test_true_gradients_of_capped_scores_vanish_where_they_saturate(isa):
    problem = make_problem(Case(B=2, Tq=33, Tk=33, P=30, D=16, options={"softcap": 1.0, "scale": 1000.0}))
    results, true = run(problem), truth(problem)
    assert float(results["grad.query"].abs().median()) < 1e-3
    torch.testing.assert_close(results["out"].double(), true["out"], rtol=1e-5, atol=1e-5)
