"""Random calls of attention, each kind of argument among them, and what must hold of a backend's results.

Backends that run on an emulated machine share them: Triton's interpreter (triton_cases.py) and the CUDA sources
(cuda_cases.py).
"""

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from attention_cases import compare_large, visible_parts, with_large_scores
from torch import Tensor

from prefix_fast import testing
from prefix_fast.backends.problem import Grads, Problem, make_plan
from prefix_fast.testing import Case, float_tensors, make_problem, truth, with_float_tensors

TOKENS = (0, 1, 2, 5, 17, 31, 32, 33, 47, 63, 64, 65)  # around tiles of 32 and 64, and primes
MOST_PROGRAMS = 12  # rows × heads × query tiles


class Memory(Protocol):
    """Where a call's tensors are put: the memory of an emulated machine."""

    def input(self, tensor: Tensor, name: str, layout: str = "dense") -> Tensor:
        """A copy that nobody may write."""

    def uninitialised(self, like: Tensor, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """A dense tensor of that shape and order of dimensions, full of NaN."""


def laid_out(tensor: Tensor, layout: str, memory: Callable[[int], Tensor]) -> Tensor:
    """A copy in `memory(count)` elements: "dense" as it is, "permuted", or "sliced" out of a wider tensor.

    Dimensions of stride 0 stay so.
    """
    once = tensor[tuple(slice(0, 1) if stride == 0 else slice(None) for stride in tensor.stride())]
    if layout == "sliced" and once.dim() > 1:
        wide = [*once.shape[:-2], 2 * once.shape[-2], once.shape[-1] + 24]
        copy = memory(math.prod(wide)).view(wide)[..., 1::2, 8 : 8 + once.shape[-1]]
    elif layout == "sliced":
        copy = memory(2 * once.numel())[::2].view_as(once)
    elif layout == "permuted" and once.dim() > 2:
        leading = [*reversed(range(once.dim() - 1)), once.dim() - 1]
        copy = memory(once.numel()).view(once.permute(leading).shape).permute(leading)
    else:
        copy = memory(once.numel()).as_strided(once.shape, torch.empty_like(once).stride())
    copy.copy_(once)
    return copy.expand(tensor.shape)


@dataclass(frozen=True)
class Call:
    """A `Case` and what it leaves open; `str(call)` tells all of it."""

    case: Case
    layouts: tuple[tuple[str, str], ...] = ()  # of tensors by name: sliced, permuted, expanded0, expanded1, expanded2
    scores: str = "normal"  # "large": up to ±1e4; "negative": all near -100, so e^-lse overflows
    hidden: str = "finite"  # what keys and values that nobody may read hold: nan, inf
    bias: str = "full"  # what attn_bias is broadcast from: full, heads, queries, one; with "-inf" some of it is -inf
    integers: str = "int64"  # dtype of ids, lengths, offsets; "strided": not dense in memory
    plan: bool = False
    grad_out: str = "dense"  # sliced, permuted, sum (all equal, stride 0)
    grad_lse: bool = True
    unwanted: tuple[str, ...] = ()  # gradients that are not asked for
    path: Any = None  # a backend's own choice of a path, of those that `random_call` was given
    apart: bool = False  # dq and dkv, also where one kernel would serve a short prefix

    def __str__(self) -> str:
        default = Call(self.case)
        parts = [f"{k}={v}" for k, v in vars(self).items() if k != "case" and v != getattr(default, k)]
        return "-".join([str(self.case), *parts])


def random_call(seed: int, dtype: torch.dtype, paths: Sequence[Any] = (None,)) -> Call:
    """A call for every kind of argument, chosen by the seed alone; the same in each dtype but for a float32 prefix.

    `paths` are what `Call.path` is chosen from; the first two serve packed calls too.
    """
    choose = random.Random(seed)
    case = replace(_random_case(choose, seed), dtype=dtype)
    if dtype != torch.float32 and choose.random() < 0.25:
        case = replace(case, prefix_dtype=torch.float32)
    names = list(float_tensors(make_problem(case)))
    layouts = tuple(
        (name, choose.choice(["sliced", "permuted", "expanded0", "expanded1", "expanded2"]))
        for name in names if choose.random() < 0.35
    )  # fmt: skip
    hides = case.key_mask != "none" or (case.lengths == "random" and case.num_sets > 0)
    return Call(
        case, layouts, scores=choose.choice(["normal"] * 14 + ["large", "negative"]),
        hidden=choose.choice(["nan", "inf"]) if hides and choose.random() < 0.6 else "finite",
        bias=choose.choice(["full", "heads", "queries", "one"]) + choose.choice(["", "-inf"]),
        integers=choose.choice(["int64", "int32", "strided"]), plan=choose.random() < 0.5,
        grad_out=choose.choice(["dense", "dense", "sliced", "permuted", "sum"]), grad_lse=choose.random() < 0.6,
        unwanted=tuple(name for name in names if choose.random() < 0.5) if choose.random() < 0.25 else (),
        path=choose.choice(paths[: 2 if case.packed else None]), apart=choose.random() < 0.5,
    )  # fmt: skip


CORNERS = (  # what chance seldom makes
    Call(Case(B=1, H=2, Hkv=2, Tq=97, Tk=97, P=65, seed=1)),  # the queries split, and not into equal parts
    Call(Case(B=9, H=2, Hkv=1, Tq=2, Tk=2, N=4, P=33, ids="random", lengths="random", seed=2), hidden="nan"),
    Call(Case(B=3, H=2, Hkv=1, Tq=5, Tk=33, P=9, attn_bias=True, options={"segment_bias": True}, seed=3),
         path="split"),
    Call(Case(B=1, H=32, Hkv=2, Tq=2, Tk=33, P=33, seed=4), grad_out="sum"),
    Call(Case(B=5, H=2, Hkv=2, Tq=33, Tk=33, N=3, P=37, ids="random", packed=True, packed_segments=True, seed=5)),
    Call(Case(B=2, H=2, Hkv=1, Tq=65, Tk=97, P=33, options={"window": 17, "in_window": True}, seed=6)),
    Call(Case(B=1, H=1, Hkv=1, Tq=1, Tk=65, P=69, num_sets=4, seed=21), path="split"),  # more parts than one reading
    Call(Case(B=3, H=2, Hkv=2, Tq=33, Tk=33, N=2, P=33, ids="random", lengths="random", seed=8), scores="negative"),
)  # fmt: skip


def _random_case(choose: random.Random, seed: int) -> Case:
    group = choose.choice([1, 1, 2, 2, 3, 4, 5, 8, 16])
    Hkv = choose.choice([1, 1, 2, 3]) if group < 4 else choose.choice([1, 1, 1, 2])
    B = max(1, min(choose.choice([1, 2, 3, 5, 5]), MOST_PROGRAMS // (group * Hkv)))
    tiles = MOST_PROGRAMS // (B * group * Hkv)
    Tq = choose.choice([t for t in TOKENS[1:] if t <= max(32 * tiles, 5)])
    slides = choose.random() < 0.3
    if slides and choose.random() < 0.6:  # long enough for a window to leave whole tiles
        B, group, Hkv, Tq = 1, min(group, 3), 1, choose.choice(TOKENS[-4:])
    Tk = Tq if choose.random() < 0.5 else choose.choice((0, *TOKENS))
    packed, packed_segments = choose.random() < 0.2, choose.random() < 0.25
    N = choose.choice([1, 1, 2, 3, 5])
    options: dict[str, Any] = {}
    if choose.random() < 0.2:
        options["softcap"] = choose.choice([0.5, 2.0, 30.0])
    if slides:
        options["window"] = choose.choice([1, 4, 17, 33])
        options["in_window"] = choose.random() < 0.5
    if choose.random() < 0.2:
        options["sinks"] = True
    if choose.random() < 0.2:
        options["scale"] = choose.choice([0.0, -0.2, 0.7])
    if not packed and not packed_segments and choose.random() < 0.15:
        options["segment_bias"] = True
    return Case(
        B=B, H=group * Hkv, Hkv=Hkv, Tq=Tq, Tk=Tk, N=N, P=choose.choice([0, 1, 9, 31, 32, 33, 37, 64, 65]),
        D=choose.choice([1, 16, 24, 32, 64, 64, 80, 96, 128, 256]), num_sets=choose.choice([0, 1, 1, 1, 2, 2, 3]),
        packed=packed, packed_segments=packed_segments, ids="random" if N > 1 or choose.random() < 0.3 else "none",
        lengths=choose.choice(["none", "random"]),
        key_mask="none" if packed else choose.choice(["none", "none", "left", "right", "scattered"]),
        attn_bias=not packed and choose.random() < 0.2, is_causal=choose.random() < 0.75,
        query_offset=choose.choice(["none", "none", "int", "rows"]),
        dropout_p=choose.choice([0.0, 0.0, 0.0, 0.0, 0.3, 0.9]), options=options, seed=seed,
    )  # fmt: skip


def problem_of(call: Call) -> Problem:
    """The numbers of a call, in plain tensors and with finite ones everywhere."""
    generator = torch.Generator().manual_seed(call.case.seed + 1)
    problem = make_problem(call.case)
    named = float_tensors(problem)
    for name, layout in call.layouts:
        dim = int(layout[-1]) if layout.startswith("expanded") else None
        if dim is not None and dim < named[name].dim() - 1 and named[name].shape[dim] > 0:
            named[name] = named[name].narrow(dim, 0, 1).expand(named[name].shape)
    if call.scores == "large":
        problem = with_large_scores(with_float_tensors(problem, named))
    if call.scores == "negative":
        for name, tensor in named.items():
            named[name] = torch.cat([tensor[..., :1] * 0 + (10 if name == "query" else -10), tensor[..., 1:]], -1)
        problem = replace(problem, scale=1.0)
    if call.scores != "normal":  # rounded, a float32 key would move such a logit by more than a weight can bear
        named = {name: tensor.to(call.case.dtype).to(tensor.dtype) for name, tensor in named.items()}
    bias = problem.attn_bias
    if bias is not None:
        source = call.bias.removesuffix("-inf")
        shape = {"heads": (1, call.case.H, 1, bias.shape[3]), "queries": (1, 1, *bias.shape[2:]), "one": (1, 1, 1, 1)}
        bias = torch.randn(shape.get(source, bias.shape), generator=generator).to(bias.dtype)
        if call.bias.endswith("-inf"):
            bias = bias.masked_fill(torch.rand(bias.shape, generator=generator) < 0.3, -torch.inf)
    return replace(with_float_tensors(problem, named), attn_bias=bias)


def gradients_of(call: Call, problem: Problem) -> tuple[Tensor, Tensor]:
    """Gradients of out and lse; zeros where lse has none."""
    grad_out, grad_lse = testing.output_grads(problem)
    if call.grad_out == "sum":
        grad_out = torch.ones((), dtype=grad_out.dtype).expand(grad_out.shape)
    return grad_out, grad_lse.float() if call.grad_lse else torch.zeros_like(grad_lse, dtype=torch.float32)


def outputs_of(call: Call, problem: Problem, machine: Any) -> tuple[Tensor, Tensor, dict[str, Tensor | None], Grads]:
    """out, lse, the gradients by name, None where not wanted, and the same as `Grads`; in uninitialised memory."""
    out = machine.uninitialised(problem.query, "out")
    lse = machine.uninitialised(problem.query[..., 0].contiguous(), "lse", torch.float32)
    grads = {
        name: None if name in call.unwanted else machine.uninitialised(t.contiguous(), f"grad.{name}")
        for name, t in float_tensors(problem).items()
    }
    of_sets = tuple((grads[f"segment{i}.key"], grads[f"segment{i}.value"]) for i in range(len(problem.sets)))
    return out, lse, grads, Grads(grads["query"], grads["key"], grads["value"], of_sets)


def placed(call: Call, problem: Problem, machine: Memory) -> Problem:
    """The same call in fenced memory, laid out and poisoned as the call says."""
    layouts = dict(call.layouts)
    named = {}
    visible = visible_parts(problem)
    for name, tensor in float_tensors(problem).items():
        if call.hidden != "finite" and name in visible:
            tensor = tensor.masked_fill(~visible[name][..., None], float(call.hidden))
        named[name] = machine.input(tensor, name, layouts.get(name, "dense"))
    of_integers = "sliced" if call.integers == "strided" else "dense"

    def integers(tensor: Tensor | None, name: str) -> Tensor | None:
        if not isinstance(tensor, Tensor):
            return tensor
        return machine.input(tensor.int() if call.integers == "int32" else tensor, name, of_integers)

    def others(tensor: Tensor | None, name: str) -> Tensor | None:
        return None if tensor is None else machine.input(tensor, name, "permuted")

    sets = []
    for i, s in enumerate(with_float_tensors(problem, named).sets):
        ids = integers(s.ids, f"ids{i}")
        plan = make_plan(ids, s.count) if call.plan and ids is not None else None
        sets.append(replace(
            s, ids=ids, lengths=integers(s.lengths, f"lengths{i}"),
            cu_seqlens=integers(s.cu_seqlens, f"cu_seqlens{i}"), bias=others(s.bias, f"bias{i}"), plan=plan,
        ))  # fmt: skip
    mask = problem.key_mask
    return replace(
        problem, query=named["query"], key=named["key"], value=named["value"], sets=tuple(sets),
        cu_seqlens_q=integers(problem.cu_seqlens_q, "cu_seqlens_q"),
        cu_seqlens_k=integers(problem.cu_seqlens_k, "cu_seqlens_k"),
        query_offset=integers(problem.query_offset, "query_offset"), attn_bias=others(problem.attn_bias, "attn_bias"),
        sinks=others(problem.sinks, "sinks"), key_mask=None if mask is None else machine.input(mask, "key_mask"),
        dropout_seed=others(problem.dropout_seed, "seed"),
    )  # fmt: skip


def check_results(call: Call, backend: str, results: dict[str, Tensor], tf32: bool = False) -> None:
    """Compare with the float64 truth, within the budget of `prefix_fast.testing`; exact zeros are exact.

    With `tf32` the truth is of the factors that products in tf32 read, and the budget that of eager PyTorch in float16,
    whose significand is as long.
    """
    problem = problem_of(call)
    grads = gradients_of(call, problem)
    if tf32:
        rounded = {name: as_tf32(tensor) for name, tensor in float_tensors(problem).items()}
        problem, grads = with_float_tensors(problem, rounded), (as_tf32(grads[0]), grads[1])
    true = truth(problem, grads)
    if tf32:
        halves = {name: tensor.to(torch.float16) for name, tensor in float_tensors(problem).items()}
        problem = with_float_tensors(problem, halves)
    if call.scores != "normal":
        compare_large(problem, backend, results, true, grads[0])
    else:
        testing.compare(problem, backend, results, true, grads)
    for name, visible in visible_parts(problem).items():
        if f"grad.{name}" in results and bool((results[f"grad.{name}"][~visible] != 0).any()):
            raise AssertionError(f"grad.{name} is not zero where no query reads {name}")
    empty = results["lse"] == -torch.inf
    if bool((results["out"][empty] != 0).any()) or bool((results.get("grad.query", results["out"])[empty] != 0).any()):
        raise AssertionError("a query that sees no key has an output or a gradient")


def as_tf32(tensor: Tensor) -> Tensor:
    """The nearest numbers of tf32, ties away from zero."""
    return ((tensor.contiguous().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


# What random calls have: each often enough, and what mutants of a feature are tried on.
KINDS = {
    "causal": lambda call: call.case.is_causal,
    "window": lambda call: "window" in call.case.options,
    "in window": lambda call: call.case.options.get("in_window") and call.case.num_sets > 0,
    "offset": lambda call: call.case.query_offset == "rows",
    "ids": lambda call: call.case.ids == "random" and call.case.num_sets > 0,
    "lengths": lambda call: call.case.lengths == "random" and call.case.num_sets > 0 and not call.case.packed_segments,
    "softcap": lambda call: "softcap" in call.case.options,
    "sinks": lambda call: "sinks" in call.case.options,
    "mask": lambda call: call.case.key_mask != "none" and call.case.Tk >= 32,
    "hidden": lambda call: call.hidden != "finite",
    "dropout": lambda call: call.case.dropout_p > 0,
    "scale": lambda call: "scale" in call.case.options,
    "bias": lambda call: call.case.attn_bias or "segment_bias" in call.case.options,
    "group": lambda call: call.case.Hkv > 1 and call.case.Hkv < call.case.H,
    "packed": lambda call: call.case.packed and call.case.B > 1,
    "strided": lambda call: call.integers == "strided",
    "layouts": lambda call: bool(call.layouts),
    "sets": lambda call: call.case.num_sets > 1,
    "no prefix": lambda call: call.case.num_sets == 0 or call.case.P == 0,
    "no own keys": lambda call: call.case.Tk == 0 and not call.case.packed,
    "float32 prefix": lambda call: call.case.prefix_dtype is not None,
    "packed segments": lambda call: call.case.packed_segments and call.case.num_sets > 0,
    "wide group": lambda call: call.case.H // call.case.Hkv >= 8,
    "not causal": lambda call: not call.case.is_causal,
    "large scores": lambda call: call.scores != "normal",
    "-inf bias": lambda call: call.case.attn_bias and call.bias.endswith("-inf"),
    "stride 0": lambda call: any(layout.startswith("expanded") for _, layout in call.layouts),
    "summed": lambda call: call.grad_out == "sum",
    "unwanted": lambda call: bool(call.unwanted),
    "no lse gradient": lambda call: not call.grad_lse,
    "plan": lambda call: call.plan and call.case.ids == "random",
    "padded head dim": lambda call: call.case.D in (1, 24, 80, 96),
    "apart": lambda call: call.apart,
}


def rare_kinds(calls: list[Call], kinds: dict[str, Callable[[Call], Any]], least: int) -> list[str]:
    """Kinds of which there are fewer."""
    counts = {name: sum(bool(has(call)) for call in calls) for name, has in kinds.items()}
    return [f"{name}: {count}" for name, count in counts.items() if count < least]
