"""Random calls, the truth about them, and how far a backend may be from it.

The rule: the error of a backend against float64 is at most twice that of plain PyTorch computing the same concatenation
in the same dtype, plus a slack: a few roundings of the largest true value and, for gradients, the roundings of what a
backward pass from `out` and `lse` alone computes again. `check` applies it to the output, the log-sum-exp and every
gradient; tests, benchmarks and `prefix-fast doctor` all use it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor

from prefix_fast import checks, dispatch
from prefix_fast.backends import reference
from prefix_fast.backends.problem import Problem, SegmentSet

SLACK = {torch.float64: 1e-13, torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
SHORT_NAMES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.float64: "fp64"}


@dataclass(frozen=True)
class Case:
    """Shape and options of a random call to the operator; `str(case)` is its test id.

    `ids` and `lengths` per set: "none", "random" (ids include -1; lengths include 0). `key_mask`: "none", "left",
    "right", "scattered". `query_offset`: "none", "int", "rows".
    """

    B: int = 2
    H: int = 4
    Hkv: int = 4
    Tq: int = 7
    Tk: int = 7
    N: int = 1
    P: int = 5
    D: int = 16
    dtype: torch.dtype = torch.float32
    prefix_dtype: torch.dtype | None = None
    num_sets: int = 1
    packed: bool = False
    packed_segments: bool = False
    ids: str = "none"
    lengths: str = "none"
    key_mask: str = "none"
    attn_bias: bool = False
    is_causal: bool = True
    query_offset: str = "none"
    dropout_p: float = 0.0
    options: dict[str, Any] = field(default_factory=dict)  # window, softcap, sinks (True), scale, segment_bias (True)
    seed: int = 0

    def __str__(self) -> str:
        parts = [f"B{self.B}-H{self.H}-Hkv{self.Hkv}-Tq{self.Tq}-Tk{self.Tk}-N{self.N}-P{self.P}-D{self.D}"]
        parts.append(SHORT_NAMES[self.dtype])
        default = Case()
        shown = [f.name for f in fields(self)][9:-1]
        for name in shown:
            value = getattr(self, name)
            if value != getattr(default, name):
                parts.append(f"{name}={SHORT_NAMES.get(value, value) if name == 'prefix_dtype' else value}")
        return "-".join(parts)


def make_problem(case: Case, device: str | torch.device = "cpu") -> Problem:
    """The random call that `case` describes; the same tensors for the same seed."""
    generator = torch.Generator("cpu").manual_seed(case.seed)

    def normal(*shape: int, dtype: torch.dtype = case.dtype) -> Tensor:
        return torch.randn(*shape, generator=generator, device="cpu").to(dtype).to(device)

    def integers(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, max(high, low + 1), shape, generator=generator, device="cpu").to(device)

    def offsets(count: int, longest: int) -> Tensor:
        return torch.cat([integers(0, 1, 1), integers(0, longest + 1, count).cumsum(0)])

    keywords: dict[str, Any] = {}
    if case.packed:
        keywords["cu_seqlens_q"], keywords["cu_seqlens_k"] = offsets(case.B, case.Tq), offsets(case.B, case.Tk)
        total_q, total_k = int(keywords["cu_seqlens_q"][-1]), int(keywords["cu_seqlens_k"][-1])
        query = normal(total_q, case.H, case.D)
        key, value = normal(total_k, case.Hkv, case.D), normal(total_k, case.Hkv, case.D)
    else:
        query = normal(case.B, case.Tq, case.H, case.D).transpose(1, 2)
        key, value = (normal(case.B, case.Tk, case.Hkv, case.D).transpose(1, 2) for _ in range(2))
    sets = tuple(_make_set(case, index, normal, integers, offsets) for index in range(case.num_sets))
    window, softcap = case.options.get("window"), case.options.get("softcap")
    problem = checks.checked_problem(
        "segment_attention", query, key, value, sets, **keywords,
        key_mask=_make_mask(case, integers), attn_bias=normal(case.B, 1, case.Tq, case.Tk) if case.attn_bias else None,
        is_causal=case.is_causal, query_offset=_make_offset(case, integers), window=window, softcap=softcap,
        sinks=normal(case.H) if case.options.get("sinks") else None, dropout_p=case.dropout_p,
        scale=case.options.get("scale"),
    )  # fmt: skip
    return replace(problem, dropout_seed=integers(0, 2**62, 1)) if case.dropout_p else problem


def _make_set(case: Case, index: int, normal: Any, integers: Any, offsets: Any) -> SegmentSet:
    dtype = case.prefix_dtype or case.dtype
    cu_seqlens = None
    length = max(case.P - index, 0)  # sets of one call differ in length
    if case.packed_segments:
        cu_seqlens = offsets(case.N, length)
        key, value = (normal(int(cu_seqlens[-1]), case.Hkv, case.D, dtype=dtype) for _ in range(2))
    else:
        key, value = (normal(case.N, case.Hkv, length, case.D, dtype=dtype) for _ in range(2))
    ids = integers(-1, case.N, case.B) if case.ids == "random" else None
    lengths = None
    if case.lengths == "random":
        lengths = integers(0, length + 1, case.N)
        if cu_seqlens is not None:
            lengths = torch.minimum(lengths, cu_seqlens.diff())
    bias = normal(1, case.H, case.Tq, length) if case.options.get("segment_bias") else None
    return SegmentSet(key, value, ids, lengths, cu_seqlens, bias, bool(case.options.get("in_window")))


def _make_mask(case: Case, integers: Any) -> Tensor | None:
    if case.key_mask == "none":
        return None
    if case.key_mask == "scattered":
        return integers(0, 3, case.B, case.Tk) > 0
    index, count = torch.arange(case.Tk, device="cpu"), integers(0, case.Tk + 1, case.B).cpu()[:, None]
    mask = index < count if case.key_mask == "right" else index >= case.Tk - count
    return mask.to(integers(0, 1, 1).device)


def _make_offset(case: Case, integers: Any) -> Tensor | int | None:
    if case.query_offset == "rows":
        return integers(-2, max(case.Tk - case.Tq, 0) + 3, case.B)
    return case.Tk - case.Tq + 1 if case.query_offset == "int" else None


def float_tensors(problem: Problem) -> dict[str, Tensor]:
    """The tensors of a call that have gradients, by name."""
    named = {"query": problem.query, "key": problem.key, "value": problem.value}
    for index, segment_set in enumerate(problem.sets):
        named |= {f"segment{index}.key": segment_set.key, f"segment{index}.value": segment_set.value}
    return named


def with_float_tensors(problem: Problem, named: dict[str, Tensor]) -> Problem:
    """The same call on other tensors, named as by `float_tensors`."""
    sets = tuple(
        replace(s, key=named[f"segment{i}.key"], value=named[f"segment{i}.value"]) for i, s in enumerate(problem.sets)
    )
    return replace(problem, query=named["query"], key=named["key"], value=named["value"], sets=sets)


def output_grads(problem: Problem, seed: int = 1) -> tuple[Tensor, Tensor]:
    """Random gradients of out and lse."""
    generator = torch.Generator("cpu").manual_seed(seed)
    grad_out = torch.randn(problem.query.shape, generator=generator, device="cpu")
    grad_lse = torch.randn(problem.query.shape[:-1], generator=generator, device="cpu")
    return grad_out.to(problem.query), grad_lse.to(problem.query.device)


def evaluate(
    problem: Problem, backend: str, grads: tuple[Tensor, Tensor] | None = None, wanted: Iterable[str] | None = None
) -> dict[str, Tensor]:
    """out, lse and, given the gradients of both, `grad.<name>` of the wanted tensors (None: of all).

    `backend` is a backend's name, or "eager": the oracle's concatenation computed in the inputs' own dtype.
    """
    named = {name: tensor.detach() for name, tensor in float_tensors(problem).items()}
    wanted = set(named if wanted is None else wanted) if grads is not None else set()
    for name in wanted:
        named[name].requires_grad_()
    copy = with_float_tensors(problem, named)
    if backend == "eager":
        out, lse = reference.attention(copy, copy.query.dtype)
    else:
        out, lse = dispatch.segment_attention(copy, backend)
    results = {"out": out.detach(), "lse": lse.detach()}
    if grads is not None and wanted:
        leaves = [named[name] for name in sorted(wanted)]
        given = [grads[0].to(out.dtype), grads[1].to(lse.dtype)]
        outputs = [(o, g) for o, g in zip((out, lse), given, strict=True) if o.requires_grad]
        computed = torch.autograd.grad(
            [o for o, _ in outputs], leaves, [g for _, g in outputs], allow_unused=True, materialize_grads=True
        )
        results |= {f"grad.{name}": grad for name, grad in zip(sorted(wanted), computed, strict=True)}
    return results


def truth(problem: Problem, grads: tuple[Tensor, Tensor] | None = None) -> dict[str, Tensor]:
    """What `evaluate` returns, computed in float64."""
    doubled = with_float_tensors(problem, {name: t.double() for name, t in float_tensors(problem).items()})
    return evaluate(doubled, "reference", grads)


def errors(results: dict[str, Tensor], true: dict[str, Tensor]) -> dict[str, float]:
    """Largest absolute error of each result; inf where one is not finite and the truth is, or the reverse."""
    found = {}
    for name, result in results.items():
        difference = (result.double() - true[name]).abs()
        same = (result.double() == true[name]) | (difference == 0)  # equal infinities are equal
        difference = torch.where(same, 0.0, torch.nan_to_num(difference, nan=torch.inf))
        found[name] = float(difference.max()) if difference.numel() else 0.0
    return found


def check(problem: Problem, backend: str, *, gradients: bool = True) -> dict[str, float]:
    """Compare a backend with the truth. Returns the errors.

    Raises:
        AssertionError: an error is over the budget; the message has every error beside its budget.
    """
    grads = output_grads(problem) if gradients else None
    return compare(problem, backend, evaluate(problem, backend, grads), truth(problem, grads))


def compare(
    problem: Problem,
    name: str,
    results: dict[str, Tensor],
    true: dict[str, Tensor],
    grads: tuple[Tensor, Tensor] | None = None,
) -> dict[str, float]:
    """Hold results, whose origin is `name`, against the truth as `check` does; for results computed elsewhere.

    `grads` are the gradients of out and lse behind both; None: those of `output_grads`.
    """
    if grads is None:
        grads = output_grads(problem) if len(true) > 2 else None
    eager = errors(evaluate(problem, "eager", grads), true)
    found = errors(results, true)
    of_out = 2 * eager["out"] if eager["out"] != torch.inf else 0.0
    cancelled = 0.0 if grads is None else _rounding_of_cancelled_sums(problem, grads[0], true["out"], of_out)
    exponent = _precision(problem) * _largest(true["lse"][true["lse"].isfinite()].abs())
    budget = {}
    for key, value in true.items():
        finite = value[value.isfinite()]
        largest = float(finite.abs().max()) if finite.numel() else 0.0
        dtype = torch.float32 if key == "lse" and problem.query.dtype != torch.float64 else problem.query.dtype
        yardstick = eager[key] if eager[key] != torch.inf else 0.0
        budget[key] = 2 * yardstick + SLACK[dtype] * max(largest, 0.1)
        if key.startswith("grad."):
            budget[key] += exponent * largest  # p = exp(s - lse) has one rounding of s and one of lse
        if key == "grad.query" or key.endswith("key"):
            budget[key] += cancelled
    if any(not found[key] <= budget[key] for key in found):
        table = ", ".join(f"{key}: {found[key]:.2e} (budget {budget[key]:.2e})" for key in found)
        raise AssertionError(f"{name} differs from the float64 truth by {table}")
    return found


def _rounding_of_cancelled_sums(problem: Problem, grad_out: Tensor, out: Tensor, out_error: float) -> float:
    """The roundings of do·v / (1 - p) - δ, δ = do·out, as they reach the gradients of queries and keys.

    Where a query sees a single key both terms are the same sum of D products, and what is left is how each was rounded,
    however small the true gradient is: u · ‖do‖ ‖v‖ / (1 - p) in float32. δ also has one rounding of each element of
    `out` to its dtype, independent of each other: u · ‖do ∘ out‖; or, of the sums that `out` is of, what a budget of
    `out_error` allows, which many equal summands give one sign: |do·out| · out_error / max |out|. Eager PyTorch takes
    both terms from one number, so it is no yardstick for this.
    """
    named = float_tensors(problem)
    values = [t for name, t in named.items() if name.endswith("value")]
    reach = max(_largest(t.abs()) for name, t in named.items() if not name.endswith("value"))
    product = _largest(grad_out.float().norm(dim=-1)) * max(_largest(t.float().norm(dim=-1)) for t in values)
    sums = _precision(problem) / 2 * product / (1 - problem.dropout_p)
    products = grad_out.double() * out
    stored = torch.finfo(problem.query.dtype).eps / 2 * _largest(products.norm(dim=-1))
    summed = out_error / max(_largest(out.abs()), 1e-30) * _largest(products.sum(dim=-1).abs())
    return abs(problem.scale) * reach * (sums + max(stored, summed))


def _precision(problem: Problem) -> float:
    """The spacing of the numbers in which a backend sums."""
    return torch.finfo(torch.float64 if problem.query.dtype == torch.float64 else torch.float32).eps


def _largest(tensor: Tensor) -> float:
    return float(tensor.max()) if tensor.numel() else 0.0
