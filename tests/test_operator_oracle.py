"""The oracle against independent definitions: PyTorch's SDPA, plain loops, finite differences, published numbers."""

import math

import pytest
import torch
import torch.nn.functional as F

import prefix_fast
from prefix_fast.backends.reference import philox
from prefix_fast.testing import Case, evaluate, float_tensors, make_problem, output_grads, with_float_tensors


def rows_by_loops(problem):
    """out and lse by the definition, one row, head and query at a time, for dense float64 calls."""
    B, H, Tq, D = problem.query.shape
    group = H // problem.key.shape[1]
    out, lse = torch.zeros(B, H, Tq, D, dtype=torch.float64), torch.full((B, H, Tq), -math.inf, dtype=torch.float64)
    for b in range(B):
        for h in range(H):
            for i in range(Tq):
                scores, values = scores_of_query(problem, b, h, h // group, i)
                if scores:
                    scores = torch.tensor(scores, dtype=torch.float64)
                    logits = scores if problem.sinks is None else torch.cat([scores, problem.sinks[h : h + 1].double()])
                    lse[b, h, i] = torch.logsumexp(logits, 0)
                    out[b, h, i] = (torch.exp(scores - lse[b, h, i])[:, None] * torch.stack(values)).sum(0)
    return out, lse


def scores_of_query(problem, b, h, kv_head, i):
    Tk, Tq = problem.key.shape[2], problem.query.shape[2]
    offset = Tk - Tq if problem.query_offset is None else problem.query_offset
    position = i + (int(offset.expand(problem.num_rows)[b]) if torch.is_tensor(offset) else offset)
    scores, values = [], []

    def add(key, value, bias):
        score = problem.scale * float(problem.query[b, h, i].double() @ key.double())
        if problem.softcap is not None:
            score = problem.softcap * math.tanh(score / problem.softcap)
        scores.append(score + bias)
        values.append(value.double())

    for index, s in enumerate(problem.sets):
        n = 0 if s.ids is None else int(s.ids[b])
        length = 0 if n < 0 else int(s.lengths[n]) if s.lengths is not None else s.key.shape[2]
        behind = sum(chosen_length(t, b) for t in problem.sets[index:] if t.in_window)
        for p in range(length):
            if s.in_window and problem.window is not None and p - behind <= position - problem.window:
                continue
            bias = 0.0 if s.bias is None else float(s.bias[0, h, i, p])
            add(s.key[n, kv_head, p], s.value[n, kv_head, p], bias)
    for j in range(Tk):
        hidden = problem.is_causal and j > position
        hidden |= problem.window is not None and j <= position - problem.window
        hidden |= problem.key_mask is not None and not bool(problem.key_mask[b, j])
        if not hidden:
            bias = 0.0 if problem.attn_bias is None else float(problem.attn_bias[b, 0, i, j])
            add(problem.key[b, kv_head, j], problem.value[b, kv_head, j], bias)
    return scores, values


def chosen_length(segment_set, b):
    n = 0 if segment_set.ids is None else int(segment_set.ids[b])
    if n < 0:
        return 0
    return segment_set.key.shape[2] if segment_set.lengths is None else int(segment_set.lengths[n])


LOOP_CASES = [
    Case(B=2, H=2, Hkv=2, Tq=4, Tk=4, P=3, D=4),
    Case(B=3, H=4, Hkv=2, Tq=3, Tk=5, N=3, P=4, D=4, ids="random", lengths="random", key_mask="left"),
    Case(B=2, H=2, Hkv=1, Tq=5, Tk=3, P=2, D=3, query_offset="rows", key_mask="scattered", attn_bias=True),
    Case(B=2, H=2, Hkv=2, Tq=4, Tk=4, P=3, D=4, is_causal=False),
    Case(B=2, H=2, Hkv=2, Tq=6, Tk=6, P=5, D=4, num_sets=2, N=2, ids="random", lengths="random",
         options={"window": 4, "in_window": True}),
    Case(B=2, H=2, Hkv=2, Tq=4, Tk=6, P=3, D=4, options={"window": 2, "softcap": 1.5, "sinks": True}),
    Case(B=2, H=2, Hkv=2, Tq=4, Tk=4, P=3, D=4, options={"segment_bias": True, "scale": 0.9}),
]  # fmt: skip


@pytest.mark.parametrize("case", LOOP_CASES, ids=str)
def test_oracle_equals_the_definition_by_loops(case):
    problem = make_problem(case)
    doubled = with_float_tensors(problem, {name: t.double() for name, t in float_tensors(problem).items()})
    results = evaluate(doubled, "reference")
    out, lse = rows_by_loops(doubled)
    torch.testing.assert_close(results["out"], out, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(results["lse"], lse, rtol=1e-12, atol=1e-12)


def test_oracle_equals_sdpa_over_the_concatenation():
    problem = make_problem(Case(B=3, H=6, Hkv=3, Tq=9, Tk=9, P=7, D=8))
    (s,) = problem.sets
    key = torch.cat([s.key.expand(3, -1, -1, -1), problem.key], 2).repeat_interleave(2, 1)
    value = torch.cat([s.value.expand(3, -1, -1, -1), problem.value], 2).repeat_interleave(2, 1)
    mask = torch.cat([torch.ones(9, 7, dtype=torch.bool), torch.ones(9, 9, dtype=torch.bool).tril()], 1)
    expected = F.scaled_dot_product_attention(problem.query, key, value, attn_mask=mask)
    torch.testing.assert_close(evaluate(problem, "reference")["out"], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "case",
    [
        Case(B=2, H=2, Hkv=1, Tq=3, Tk=3, N=2, P=3, D=2, ids="random", lengths="random"),
        Case(B=2, H=2, Hkv=2, Tq=3, Tk=3, P=2, D=2, dropout_p=0.4),
        Case(B=3, H=2, Hkv=2, Tq=3, Tk=3, P=2, D=2, packed=True, packed_segments=True, N=2, ids="random"),
        Case(B=2, H=2, Hkv=2, Tq=3, Tk=3, P=2, D=2, options={"softcap": 1.0, "sinks": True, "window": 2}),
        Case(B=2, H=2, Hkv=2, Tq=4, Tk=2, P=0, D=2, key_mask="left"),
    ],
    ids=str,
)
def test_oracle_passes_gradcheck_and_gradgradcheck(case):
    problem = make_problem(case)
    named = {name: t.double().requires_grad_() for name, t in float_tensors(problem).items()}

    def function(*tensors):
        results = prefix_fast.dispatch.segment_attention(
            with_float_tensors(problem, dict(zip(named, tensors, strict=True))), "reference"
        )
        return results[0], torch.where(results[1].isfinite(), results[1], 0)

    assert torch.autograd.gradcheck(function, tuple(named.values()))
    assert torch.autograd.gradgradcheck(function, tuple(named.values()))


@pytest.mark.parametrize(
    ("seed", "counter", "words"),
    [
        (0x0, (0, 0, 0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        (-1, (0xFFFFFFFF,) * 4, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            0x299F31D0A4093822,
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
    ids=["zeros", "ones", "pi"],
)
def test_philox_gives_the_published_words(seed, counter, words):
    """Known answers of the Random123 distribution."""
    computed = philox(torch.tensor([seed]), *(torch.tensor([c]) for c in counter))
    assert tuple(int(word) for word in computed) == words


def test_dropout_keeps_the_stated_share_and_scales_it():
    """With equal scores and unit values the output is kept / ((1 - p) * count): its mean shows rate and scale."""
    P, p = 4096, 0.25
    query, own = torch.zeros(2, 2, 8, 4), torch.zeros(2, 2, 0, 4)
    out = prefix_fast.prefix_attention(
        query, own, own, torch.zeros(1, 2, P, 4), torch.ones(1, 2, P, 4), dropout_p=p, backend="reference"
    )
    kept = out[..., 0] * (1 - p)
    weights = kept.numel() * P
    assert abs(float(kept.mean()) - (1 - p)) < 5 * math.sqrt(p * (1 - p) / weights)


def test_evaluate_reports_every_gradient():
    problem = make_problem(Case(num_sets=2))
    results = evaluate(problem, "reference", output_grads(problem))
    assert {"out", "lse", *(f"grad.{name}" for name in float_tensors(problem))} == set(results)
