"""The operators `torch.ops.prefix_fast.*`: schemas, fake kernels, autograd. Device code is loaded by the first call.

One boundary serves every backend: `segment_attention` returns (out, lse) and `segment_attention_backward` the wanted
gradients. Their arguments are the fields of `Problem` in plain form, followed by the name of the backend that runs.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Sequence
from types import ModuleType
from typing import Any, NoReturn

import torch
from torch import Tensor

from prefix_fast import kept
from prefix_fast.backends.problem import Grads, Plan, Problem, SegmentSet, check_values

BACKEND_MODULES = {
    "cpu": "prefix_fast.backends.native",
    "triton": "prefix_fast.backends.triton",
    "cuda": "prefix_fast.backends.cuda",
    "reference": "prefix_fast.backends.reference",
}

_PROBLEM_SCHEMA = (
    "Tensor query, Tensor key, Tensor value, Tensor[] segment_keys, Tensor[] segment_values, "
    "Tensor?[] segment_ids, Tensor?[] segment_lengths, Tensor?[] segment_cu_seqlens, Tensor?[] segment_biases, "
    "bool[] in_window, Tensor?[] plan_orders, Tensor?[] plan_starts, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, "
    "SymInt? max_seqlen_q, SymInt? max_seqlen_k, Tensor? key_mask, Tensor? attn_bias, bool is_causal, Tensor? "
    "query_offset_tensor, SymInt? query_offset, SymInt? window, float? softcap, Tensor? sinks, float dropout_p, "
    "Tensor? dropout_seed, float scale, str backend"
)

_LIBRARY = torch.library.Library("prefix_fast", "DEF")
_LIBRARY.define(
    f"segment_attention({_PROBLEM_SCHEMA}) -> (Tensor out, Tensor lse)", tags=(torch.Tag.pt2_compliant_tag,)
)
_LIBRARY.define(
    f"segment_attention_backward({_PROBLEM_SCHEMA}, Tensor out, Tensor lse, Tensor grad_out, Tensor? grad_lse, "
    "bool[] wanted) -> Tensor[]",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def segment_attention(problem: Problem, backend: str) -> tuple[Tensor, Tensor]:
    """Run the operator on the backend of that name. Returns out in query's layout and dtype, and lse."""
    tensors = _tensors(problem)
    if not _dispatches_nothing(tensors):
        return torch.ops.prefix_fast.segment_attention(*_to_arguments(problem, backend))
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors):
        leaves, sizes = _flatten(_to_arguments(problem, backend))
        return _SegmentAttention.apply(problem, sizes, *leaves)
    return _run_forward(problem, backend)


def _dispatches_nothing(tensors: Sequence[Tensor | None]) -> bool:
    """Whether PyTorch's dispatcher would only call the kernel, which takes it longer than short calls do.

    It is needed for tracing, modes and profilers, for meta tensors, and for subclasses of Tensor.
    """
    if torch.compiler.is_compiling() or torch.autograd._profiler_enabled():
        return False
    modes = torch._C._len_torch_dispatch_stack() + torch._C._len_torch_function_stack()
    if modes or torch._C._get_tracing_state() is not None or torch._C._functorch.peek_interpreter_stack() is not None:
        return False
    plain = (Tensor, torch.nn.Parameter)
    return all(tensor is None or (type(tensor) in plain and not tensor.is_meta) for tensor in tensors)


def _tensors(problem: Problem) -> list[Tensor | None]:
    """The call's floating-point tensors, and its masks."""
    tensors = [problem.query, problem.key, problem.value, problem.key_mask, problem.attn_bias]
    for segments in problem.sets:
        tensors += [segments.key, segments.value, segments.bias]
    return tensors


@functools.cache
def load_backend(name: str) -> ModuleType:
    """The module that serves the backend `name`, imported at the first use."""
    return importlib.import_module(BACKEND_MODULES[name])


def _to_arguments(problem: Problem, backend: str) -> tuple[Any, ...]:
    sets, offset = problem.sets, problem.query_offset
    orders, starts = ([None if s.plan is None else s.plan[i] for s in sets] for i in range(2))
    offset_tensor, offset_int = (offset, None) if isinstance(offset, Tensor) else (None, offset)
    return (
        problem.query, problem.key, problem.value,
        [s.key for s in sets], [s.value for s in sets], [s.ids for s in sets], [s.lengths for s in sets],
        [s.cu_seqlens for s in sets], [s.bias for s in sets], [s.in_window for s in sets], orders, starts,
        problem.cu_seqlens_q, problem.cu_seqlens_k, problem.max_seqlen_q, problem.max_seqlen_k,
        problem.key_mask, problem.attn_bias, problem.is_causal, offset_tensor, offset_int,
        problem.window, problem.softcap, problem.sinks, problem.dropout_p, problem.dropout_seed, problem.scale,
        backend,
    )  # fmt: skip


def _to_problem(  # type: ignore[no-untyped-def]  # the fields of Problem, which has the types
    query, key, value,
    segment_keys, segment_values, segment_ids, segment_lengths, segment_cu_seqlens, segment_biases, in_window,
    plan_orders, plan_starts, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
    key_mask, attn_bias, is_causal, offset_tensor, offset_int,
    window, softcap, sinks, dropout_p, dropout_seed, scale,
) -> Problem:  # fmt: skip
    """The inverse of `_to_arguments`, without the backend's name."""
    plans = [None if o is None else Plan(o, s) for o, s in zip(plan_orders, plan_starts, strict=True)]
    columns = (segment_keys, segment_values, segment_ids, segment_lengths, segment_cu_seqlens, segment_biases)
    return Problem(
        query, key, value, tuple(SegmentSet(*row) for row in zip(*columns, in_window, plans, strict=True)),
        cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
        key_mask, attn_bias, is_causal, offset_int if offset_tensor is None else offset_tensor,
        window, softcap, sinks, dropout_p, dropout_seed, scale,
    )  # fmt: skip


def _empty_rows(like: Tensor) -> Tensor:
    """Uninitialised, shaped as `like`; dense rows lie in memory as [B, T, heads, D], as the next linear layer reads."""
    if like.dim() == 3:
        return like.new_empty(like.shape)
    return torch.empty_permuted(like.shape, (0, 2, 1, 3), dtype=like.dtype, device=like.device)


def _empty_outputs(query: Tensor) -> tuple[Tensor, Tensor]:
    lse_dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    return _empty_rows(query), query.new_empty(query.shape[:-1], dtype=lse_dtype)


def _empty_grads(args: tuple[Any, ...], wanted: list[bool]) -> list[Tensor | None]:
    rows, segments = args[:3], (*args[3], *args[4])
    grads = [_empty_rows(t) if want else None for t, want in zip(rows, wanted[:3], strict=True)]
    return grads + [t.new_empty(t.shape) if want else None for t, want in zip(segments, wanted[3:], strict=True)]


def _forward(*args: Any) -> tuple[Tensor, Tensor]:
    return _run_forward(_to_problem(*args[:-1]), args[-1])


def _run_forward(problem: Problem, backend: str) -> tuple[Tensor, Tensor]:
    check_values(problem)
    out, lse = _empty_outputs(problem.query)
    load_backend(backend).forward(problem, out, lse)
    return out, lse


def _forward_fake(*args: Any) -> tuple[Tensor, Tensor]:
    return _empty_outputs(args[0])


def _backward(*args: Any) -> list[Tensor]:
    *problem_args, backend, out, lse, grad_out, grad_lse, wanted = args
    problem = _to_problem(*problem_args)
    grads = _empty_grads(tuple(problem_args), wanted)
    count = len(problem.sets)
    of_sets = tuple(zip(grads[3 : 3 + count], grads[3 + count :], strict=True))
    load_backend(backend).backward(problem, out, lse, grad_out, grad_lse, Grads(grads[0], grads[1], grads[2], of_sets))
    return [grad for grad in grads if grad is not None]


def _backward_fake(*args: Any) -> list[Tensor]:
    return [grad for grad in _empty_grads(args, args[-1]) if grad is not None]


def _flatten(args: tuple[Any, ...]) -> tuple[list[Any], tuple[int | None, ...]]:
    """The operator's arguments without lists, which autograd does not look into, and the lists' lengths."""
    leaves: list[Any] = []
    for arg in args:
        leaves.extend(arg) if isinstance(arg, list) else leaves.append(arg)
    return leaves, tuple(len(arg) if isinstance(arg, list) else None for arg in args)


def _unflatten(leaves: Sequence[Any], sizes: tuple[int | None, ...]) -> list[Any]:
    args, at = [], 0
    for size in sizes:
        args.append(leaves[at] if size is None else list(leaves[at : at + size]))
        at += 1 if size is None else size
    return args


class _SegmentAttention(torch.autograd.Function):
    """The operator's derivative. `leaves` are all arguments, flattened, and `problem` the same without a dispatcher."""

    @staticmethod
    def forward(
        ctx: Any, problem: Problem | None, sizes: tuple[int | None, ...], *leaves: Any
    ) -> tuple[Tensor, Tensor]:
        run = kept.current()
        results = run.region.take() if run is not None and run.again else None
        if results is None and problem is not None:
            results = _run_forward(problem, leaves[-1])
        elif results is None:
            with torch._C._AutoDispatchBelowAutograd():
                results = torch.ops.prefix_fast.segment_attention(*_unflatten(leaves, sizes))
        out, lse = results
        if run is not None and not run.again:
            run.region.keep(out, lse)
        tensors = [leaf if isinstance(leaf, Tensor) else None for leaf in leaves]
        ctx.save_for_backward(*tensors, out, lse)
        ctx.sizes, ctx.others = sizes, [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
        *tensors, out, lse = ctx.saved_tensors
        leaves = [o if t is None else t for t, o in zip(tensors, ctx.others, strict=True)]
        args = _unflatten(leaves, ctx.sizes)
        inputs = leaves[: 3 + 2 * len(args[3])]  # query, key, value, segment keys, segment values
        wanted = list(ctx.needs_input_grad[2 : 2 + len(inputs)])
        if grad_out is None:
            grad_out = torch.zeros_like(out)
        results = (out, lse, grad_out, grad_lse)
        if torch.is_grad_enabled() and args[-1] == "reference":
            chosen = [t for t, want in zip(inputs, wanted, strict=True) if want]
            grads = load_backend("reference").gradients(
                _to_problem(*args[:-1]), chosen, grad_out, grad_lse, create_graph=True
            )
        elif not torch.is_grad_enabled() and _dispatches_nothing((*tensors, *results)):
            grads = _backward(*args, *results, wanted)
        else:
            grads = torch.ops.prefix_fast.segment_attention_backward(*args, *results, wanted)
        remaining = iter(grads)
        aligned = [next(remaining) if want else None for want in wanted]
        return (None, None, *aligned, *[None] * (len(leaves) - len(inputs)))


class _OnceDifferentiable(torch.autograd.Function):
    """The identity on computed gradients, whose own derivative does not exist and says so."""

    @staticmethod
    def forward(ctx: Any, num_grads: int, *grads_and_sources: Tensor) -> tuple[Tensor, ...]:
        return tuple(grad.view_as(grad) for grad in grads_and_sources[:num_grads])

    @staticmethod
    def backward(ctx: Any, *_: Any) -> NoReturn:
        raise NotImplementedError(
            "prefix_fast: second derivatives exist on backend='reference' only, got a backward through gradients that "
            "another backend computed; pass backend='reference' to the call whose second derivative is needed"
        )


def _forward_autograd(keyset: Any, *args: Any) -> tuple[Tensor, Tensor]:
    if torch.is_grad_enabled():
        leaves, sizes = _flatten(args)
        if any(isinstance(leaf, Tensor) and leaf.requires_grad for leaf in leaves):
            return _SegmentAttention.apply(None, sizes, *leaves)
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.prefix_fast.segment_attention(*args)


def _backward_autograd(keyset: Any, *args: Any) -> list[Tensor]:
    with torch._C._AutoDispatchBelowAutograd():
        grads = torch.ops.prefix_fast.segment_attention_backward(*args)
    if torch.is_grad_enabled():
        sources = [x for x in _flatten(args)[0] if isinstance(x, Tensor) and x.requires_grad]
        if sources:
            return list(_OnceDifferentiable.apply(len(grads), *grads, *sources))
    return grads


_LIBRARY.impl("segment_attention", _forward, "CompositeExplicitAutograd")
_LIBRARY.impl("segment_attention_backward", _backward, "CompositeExplicitAutograd")
_LIBRARY.impl("segment_attention", _forward_autograd, "Autograd", with_keyset=True)
_LIBRARY.impl("segment_attention_backward", _backward_autograd, "Autograd", with_keyset=True)
torch.library.register_fake("prefix_fast::segment_attention", _forward_fake, lib=_LIBRARY)
torch.library.register_fake("prefix_fast::segment_attention_backward", _backward_fake, lib=_LIBRARY)
