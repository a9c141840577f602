"""What must hold of the operator on every backend, whatever the numbers."""

import os
from dataclasses import replace
from functools import partial

import pytest
import torch

import prefix_fast
from prefix_fast import Segment, dispatch, testing
from prefix_fast.testing import Case, check, evaluate, float_tensors, output_grads, with_float_tensors

# test_triton_interpreter.py runs this file with Triton's interpreter, tests/gpu on a device.
DEVICE = os.environ.get("PREFIX_FAST_TEST_DEVICE", "cpu")
BACKENDS = ("reference", "triton" if DEVICE != "cpu" or os.environ.get("TRITON_INTERPRET") == "1" else "cpu")
HALVES = (torch.bfloat16, torch.float16)

make_problem = partial(testing.make_problem, device=DEVICE)


@pytest.fixture(autouse=True)
def on_the_device():
    with torch.device(DEVICE):
        yield


SHAPES = [
    Case(B=1, Tq=1, Tk=1, P=1, D=1),
    Case(B=3, Tq=17, Tk=17, P=63, D=16),
    Case(B=2, Tq=63, Tk=63, P=17, D=32, H=6, Hkv=3),
    Case(B=2, Tq=64, Tk=64, P=64, D=64, H=2, Hkv=1),
    Case(B=2, Tq=65, Tk=65, P=130, D=80, H=2, Hkv=2),
    Case(B=9, Tq=5, Tk=5, P=33, D=24, H=8, Hkv=1),
    Case(P=0),
    Case(Tk=0),
    Case(Tk=0, P=0),
    Case(Tq=0),
    Case(B=0),
    Case(num_sets=0),
    Case(N=0, ids="random"),
    Case(B=5, N=4, P=19, ids="random", lengths="random"),
    Case(B=4, N=2, P=9, num_sets=3, ids="random", lengths="random"),
    Case(B=4, N=3, P=40, packed=True, packed_segments=True, ids="random", Tq=20, Tk=33),
    Case(B=4, P=40, packed=True, Tq=33, Tk=20),
    Case(B=4, N=3, P=21, packed_segments=True, ids="random", lengths="random"),
    Case(Tq=3, Tk=70, P=20),
    Case(Tq=9, Tk=4, P=3),
    Case(Tq=9, Tk=9, query_offset="rows", B=6),
    Case(Tq=9, Tk=30, query_offset="int"),
    Case(is_causal=False, Tq=20, Tk=9),
    Case(B=4, key_mask="left", Tq=40, Tk=40),
    Case(B=4, key_mask="right", Tq=40, Tk=40),
    Case(B=4, key_mask="scattered", Tq=40, Tk=40, is_causal=False),
    Case(attn_bias=True, Tq=20, Tk=20),
    Case(dropout_p=0.3, Tq=20, Tk=20, P=30, Hkv=2),
    Case(dropout_p=0.5, num_sets=2, packed=True, B=3),
    Case(options={"scale": 0.02}),
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", SHAPES, ids=str)
def test_error_is_within_the_budget_for_fp32(case, backend):
    check(make_problem(case), backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", HALVES, ids=["bf16", "fp16"])
@pytest.mark.parametrize("case", SHAPES[1::3], ids=str)
def test_error_is_within_the_budget_for_half_precision(case, dtype, backend):
    check(make_problem(replace(case, dtype=dtype)), backend)
    check(make_problem(replace(case, dtype=dtype, prefix_dtype=torch.float32)), backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_long_prefix_in_half_precision_accumulates_in_float32(backend):
    check(make_problem(Case(B=16, Tq=32, Tk=32, P=700, D=64, H=2, Hkv=2, dtype=torch.bfloat16)), backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_query_that_sees_no_key_has_zero_output_and_zero_gradients(backend):
    case = Case(B=3, N=1, ids="random", Tq=6, Tk=6)
    problem = make_problem(case)
    mask = torch.ones(3, 6, dtype=torch.bool)
    mask[0] = False
    (s,) = problem.sets
    problem = replace(problem, key_mask=mask, sets=(replace(s, ids=torch.tensor([-1, 0, -1])),))
    results = evaluate(problem, backend, output_grads(problem))
    assert torch.equal(results["out"][0], torch.zeros_like(results["out"][0]))
    assert bool((results["lse"][0] == -torch.inf).all())
    for name in ("grad.query", "grad.key", "grad.value"):
        assert torch.equal(results[name][0], torch.zeros_like(results[name][0]))
    assert all(bool(results[name].isfinite().all()) for name in results if name != "lse")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_what_lies_beyond_the_valid_part_never_leaks(backend, poison):
    problem = make_problem(Case(B=4, N=3, P=11, ids="random", lengths="random", key_mask="scattered", Tq=9, Tk=9))
    grads = output_grads(problem)
    clean = evaluate(problem, backend, grads)
    (s,) = problem.sets
    hidden = torch.arange(11) >= s.lengths[:, None]
    masked = ~problem.key_mask
    named = {name: t.clone() for name, t in float_tensors(problem).items()}
    for name, t in named.items():
        if name.startswith("segment"):
            t.masked_fill_(hidden[:, None, :, None], poison)
        elif name != "query":
            t.masked_fill_(masked[:, None, :, None], poison)
    poisoned = evaluate(with_float_tensors(problem, named), backend, grads)
    for name, value in clean.items():
        assert torch.equal(value, poisoned[name]), name
    for name in ("grad.segment0.key", "grad.segment0.value"):
        assert bool((poisoned[name].transpose(1, 2)[hidden] == 0).all())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["query", "key", "value", "segment0.key", "segment0.value"])
@pytest.mark.parametrize("tokens", [1, 5])
def test_a_nan_in_what_is_read_shows(name, tokens, backend):
    problem = make_problem(Case(Tq=tokens, Tk=tokens))
    named = {each: t.clone() for each, t in float_tensors(problem).items()}
    named[name][0, 0, 0, 0] = float("nan")
    results = evaluate(with_float_tensors(problem, named), backend, output_grads(problem))
    assert bool(results["out"].isnan().any())
    assert bool(results["lse"].isnan().any()) == ("value" not in name)
    assert bool(results["grad.query"].isnan().any())


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_bias_of_the_smallest_number_is_no_mask(backend):
    """Padding as some libraries write it: where every key has it, the weights are equal and not zero."""
    problem = make_problem(Case(num_sets=0, Tq=3, Tk=4, is_causal=False))
    problem = replace(problem, attn_bias=torch.full((3, 4), torch.finfo(torch.float32).min))
    out = evaluate(problem, backend)["out"]
    torch.testing.assert_close(out, problem.value.mean(2, keepdim=True).expand_as(out), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_unused_prefixes_have_exactly_zero_gradient(backend):
    problem = make_problem(Case(B=3, N=4, P=6, ids="random"))
    (s,) = problem.sets
    problem = replace(problem, sets=(replace(s, ids=torch.tensor([2, -1, 2])),))
    results = evaluate(problem, backend, output_grads(problem))
    for name in ("grad.segment0.key", "grad.segment0.value"):
        assert bool((results[name][[0, 1, 3]] == 0).all())
        assert bool((results[name][2] != 0).any())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_a_shared_prefix_equals_a_copy_for_each_row(backend, dropout_p):
    problem = make_problem(Case(B=5, P=13, H=4, Hkv=2, dropout_p=dropout_p))
    grads = output_grads(problem)
    shared = evaluate(problem, backend, grads)
    (s,) = problem.sets
    copies = replace(s, key=s.key.repeat(5, 1, 1, 1), value=s.value.repeat(5, 1, 1, 1), ids=torch.arange(5))
    copied = evaluate(replace(problem, sets=(copies,)), backend, grads)
    for name in ("out", "lse", "grad.query", "grad.key", "grad.value"):
        torch.testing.assert_close(copied[name], shared[name], rtol=1e-5, atol=1e-6)
    for name in ("grad.segment0.key", "grad.segment0.value"):
        torch.testing.assert_close(copied[name].sum(0, keepdim=True), shared[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_sets_equal_one_of_both_lengths(backend):
    problem = make_problem(Case(B=3, P=30))
    (s,) = problem.sets
    parts = tuple(
        replace(s, key=s.key[:, :, part], value=s.value[:, :, part]) for part in (slice(0, 11), slice(11, 30))
    )
    grads = output_grads(problem)
    whole, split = evaluate(problem, backend, grads), evaluate(replace(problem, sets=parts), backend, grads)
    for name in ("out", "lse", "grad.query", "grad.key", "grad.value"):
        torch.testing.assert_close(split[name], whole[name], rtol=1e-5, atol=2e-6)
    for kind in ("key", "value"):
        joined = torch.cat([split[f"grad.segment{i}.{kind}"] for i in range(2)], dim=2)
        torch.testing.assert_close(joined, whole[f"grad.segment0.{kind}"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_parts_merged_by_lse_equal_the_whole_and_stay_differentiable(backend):
    problem = make_problem(Case(B=2, Tq=8, Tk=8, P=9))
    (s,) = problem.sets
    leaves = [t.clone().requires_grad_() for t in (problem.query, problem.key, problem.value, s.key, s.value)]
    query, key, value, prefix_key, prefix_value = leaves
    whole = prefix_fast.prefix_attention(*leaves, backend=backend)
    none = torch.zeros(2, 4, 0, 16)
    out1, lse1 = prefix_fast.prefix_attention(
        query, none, none, prefix_key, prefix_value, backend=backend, return_lse=True
    )
    out2, lse2 = prefix_fast.segment_attention(query, key, value, [], backend=backend, return_lse=True)
    lse = torch.logaddexp(lse1, lse2)
    merged = out1 * (lse1 - lse).exp()[..., None] + out2 * (lse2 - lse).exp()[..., None]
    torch.testing.assert_close(merged, whole, rtol=1e-5, atol=1e-6)
    grad = torch.randn_like(whole)
    for a, b in zip(torch.autograd.grad(merged, leaves, grad), torch.autograd.grad(whole, leaves, grad), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_packed_rows_equal_the_same_rows_dense(backend):
    packed = make_problem(Case(B=4, packed=True, Tq=9, Tk=12, P=7, H=4, Hkv=2))
    result = evaluate(packed, backend)
    for b in range(4):
        (q0, q1), (k0, k1) = packed.cu_seqlens_q[b : b + 2].tolist(), packed.cu_seqlens_k[b : b + 2].tolist()
        (s,) = packed.sets
        row = [t.transpose(0, 1)[None] for t in (packed.query[q0:q1], packed.key[k0:k1], packed.value[k0:k1])]
        out, lse = prefix_fast.prefix_attention(*row, s.key, s.value, backend=backend, return_lse=True)
        torch.testing.assert_close(result["out"][q0:q1], out[0].transpose(0, 1), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(result["lse"][q0:q1], lse[0].transpose(0, 1), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("tokens", [1, 20])
def test_a_row_is_bitwise_the_same_in_any_order_and_company(tokens):
    """Of the kernels: the oracle's GEMMs are PyTorch's, whose rounding depends on the batch."""
    problem = make_problem(Case(B=11, N=3, P=77, D=32, ids="random", lengths="random", Tq=tokens, Tk=tokens + 5))
    order = torch.randperm(11)
    (s,) = problem.sets
    rows = {name: getattr(problem, name)[order] for name in ("query", "key", "value")}
    shuffled = replace(problem, **rows, sets=(replace(s, ids=s.ids[order]),))
    other = replace(problem, sets=(replace(s, ids=torch.cat([s.ids[:1], s.ids[1:].roll(1)])),))
    grads = output_grads(problem)
    base = evaluate(problem, BACKENDS[1], grads)
    again = evaluate(shuffled, BACKENDS[1], tuple(g[order] for g in grads))
    company = evaluate(other, BACKENDS[1], grads)
    for name in ("out", "lse", "grad.query", "grad.key", "grad.value"):
        assert torch.equal(base[name][order], again[name]), name
        assert torch.equal(base[name][0], company[name][0]), name


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", [1e4, -1e4, 0.0])
def test_large_and_equal_scores_stay_finite(backend, size):
    query = torch.ones(1, 2, 5, 16)
    key, value = torch.full((1, 2, 5, 16), size), torch.randn(1, 2, 5, 16)
    prefix_key, prefix_value = torch.full((1, 2, 6, 16), size), torch.randn(1, 2, 6, 16)
    out, lse = prefix_fast.prefix_attention(
        query, key, value, prefix_key, prefix_value, scale=1 / 16, backend=backend, return_lse=True
    )
    counts = 6 + torch.arange(1, 6)
    means = (prefix_value.sum(2, keepdim=True) + value.cumsum(2)) / counts[:, None]
    torch.testing.assert_close(out, means, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(lse, (size + counts.log()).expand(1, 2, 5), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_strides_do_not_matter(backend):
    problem = make_problem(Case(B=3, H=4, Hkv=2, Tq=9, Tk=9, P=8, D=16))
    (s,) = problem.sets
    wide = torch.randn(3, 9, 3, 4, 48)
    wide[:, :, 1, :, 16:32] = problem.query.transpose(1, 2)
    expanded = problem.key[:1].expand(3, -1, -1, -1)
    backwards = torch.randn(8, 2, 1, 16)
    backwards.copy_(s.key.permute(2, 1, 0, 3))
    strided = replace(
        problem, query=wide[:, :, 1, :, 16:32].transpose(1, 2), key=expanded,
        sets=(replace(s, key=backwards.permute(2, 1, 0, 3)),),
    )  # fmt: skip
    plain = replace(problem, key=expanded.contiguous())
    grads = output_grads(problem)
    a, b = evaluate(strided, backend, grads), evaluate(plain, backend, grads)
    for name in a:
        assert (
            torch.equal(a[name], b[name]) if backend != "reference" else torch.allclose(a[name], b[name], atol=1e-6)
        ), name


@pytest.mark.parametrize("wanted", [("query",), ("segment0.key",), ("segment0.value",), ("key", "value")], ids=str)
def test_only_the_wanted_gradients_are_computed(wanted, monkeypatch):
    problem = make_problem(Case())
    backend = dispatch.ops.load_backend(BACKENDS[1])
    seen = []
    original = backend.backward
    monkeypatch.setattr(backend, "backward", lambda *args: (seen.append(args[-1]), original(*args)))
    every = evaluate(problem, BACKENDS[1], output_grads(problem))
    some = evaluate(problem, BACKENDS[1], output_grads(problem), wanted)
    grads = seen[-1]
    allocated = {
        "query": grads.query, "key": grads.key, "value": grads.value,
        "segment0.key": grads.sets[0][0], "segment0.value": grads.sets[0][1],
    }  # fmt: skip
    assert {name for name, tensor in allocated.items() if tensor is not None} == set(wanted)
    for name in wanted:
        assert torch.equal(some[f"grad.{name}"], every[f"grad.{name}"])


@pytest.mark.parametrize("dropout_p", [0.1, 0.9])
def test_dropout_is_the_same_on_every_backend_for_a_seed(dropout_p):
    """With equal scores and one-hot values the output shows every single weight, so equal outputs are equal masks."""
    P, T = 37, 5
    arguments = [torch.zeros(2, 2, T, 64), torch.zeros(2, 2, T, 64), torch.zeros(2, 2, T, 64), torch.zeros(1, 2, P, 64)]
    values = torch.eye(64)[:P].expand(1, 2, P, 64)
    outs = []
    for backend in BACKENDS:
        torch.manual_seed(7)
        outs.append(prefix_fast.prefix_attention(*arguments, values, dropout_p=dropout_p, backend=backend))
    assert torch.equal(outs[0] > 0, outs[1] > 0)
    assert 0 < float((outs[0][..., :P] > 0).float().mean()) < 1


def test_segments_may_be_activations():
    source = torch.randn(1, 2, 6, 8, requires_grad=True)
    query = torch.randn(2, 4, 3, 8)
    own = torch.randn(2, 2, 3, 8)
    out = prefix_fast.segment_attention(query, own, own, Segment(source * 2, source * 3))
    out.square().sum().backward()
    assert bool(source.grad.isfinite().all())
    assert bool((source.grad != 0).any())
