"""The public functions `prefix_attention` and `segment_attention`, and `Segment`.

They check types and shapes (values are checked inside the operator, where tracing does not see them), turn everything
into segment sets and hand over to `dispatch`.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from prefix_fast import checks, dispatch
from prefix_fast.backends.problem import Plan, Problem, SegmentSet


@dataclass(frozen=True)
class Segment:
    """A set of N shared segments of keys and values, of which each row of a call reads one or none.

    Attributes:
        key, value: [N, Hkv, P, D], or packed [total, Hkv, D] with `cu_seqlens`. Parameters or activations.
        ids: [B] integers in [-1, N); -1: the row reads none. None: N is 1 and every row reads it.
        lengths: [N] valid keys of each segment. None: all of them. Keys past them are never read.
        cu_seqlens: [N + 1] offsets of packed segments, from 0 to total.
        bias: additive, broadcastable to [B, H, Tq, P]; takes no gradient.
        in_window: the keys are positions right before the row's own and leave a sliding window as they do.
        plan: `make_plan(ids, N)`, made once where several calls have the same ids. None: each call makes its own.
    """

    key: Tensor
    value: Tensor
    ids: Tensor | None = None
    lengths: Tensor | None = None
    cu_seqlens: Tensor | None = None
    bias: Tensor | None = None
    in_window: bool = False
    plan: Plan | None = None


def prefix_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix_key: Tensor,
    prefix_value: Tensor,
    *,
    prefix_ids: Tensor | None = None,
    prefix_lengths: Tensor | None = None,
    plan: Plan | None = None,
    key_mask: Tensor | None = None,
    attn_bias: Tensor | None = None,
    is_causal: bool = True,
    query_offset: Tensor | int | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    dropout_p: float = 0.0,
    scale: float | None = None,
    backend: str = "auto",
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of every row to a shared prefix and to its own tokens, without building their concatenation.

    out[b, h, i] = sum_j softmax_j(scale * q[b, h, i] . k_j) v_j, where j runs over the keys of the row's prefix and
    then over the row's own keys visible to query i. Dimensions: B rows, H query heads, Hkv key/value heads (H a
    multiple of Hkv), Tq / Tk query / key tokens, N prefixes, P (padded) prefix length, D head dim.

    Args:
        query: [B, H, Tq, D], float32, bfloat16 or float16 (float64 on `reference`); any strides with a contiguous last
            dim, here and below.
        key, value: [B, Hkv, Tk, D] in query's dtype; Tk may be 0.
        prefix_key, prefix_value: [N, Hkv, P, D] in query's dtype, or float32 beside half-precision queries; P may be 0.
        prefix_ids: [B] integers in [-1, N); -1: the row has no prefix. None: N is 1, shared by all rows.
        prefix_lengths: [N] valid length of each prefix, at most P. None: P.
        plan: `make_plan(prefix_ids, N)`, made once where several calls have the same ids: the layers of a model. On a
            GPU a plan of other ids gives wrong results unless PREFIX_FAST_DEBUG=1 checks it. None: the call makes one.
        key_mask: [B, Tk] bool, True: may be attended.
        attn_bias: additive, broadcastable to [B, H, Tq, Tk], own tokens only; takes no gradient.
        is_causal: own token j is visible to query i when j <= i + query_offset. The prefix always is.
        query_offset: int, or integer tensor, 0-dim or [B]. None: Tk - Tq.
        window: own key j also needs j > i + query_offset - window. The prefix stays visible.
        softcap: s becomes softcap * tanh(s / softcap) before bias and masks.
        sinks: [H] extra logits in the softmax's denominator; take no gradient.
        dropout_p: probability in [0, 1) of dropping an attention weight, drawn from PyTorch's generator.
        scale: factor of the scores. None: D ** -0.5.
        backend: "auto", "reference", "cpu", "triton" or "cuda".
        return_lse: also return the log-sum-exp.

    Returns:
        out [B, H, Tq, D] in query's dtype and, with `return_lse`, lse [B, H, Tq] in float32 (natural logarithm; with
        sinks, of the whole denominator). A query that sees no key has out 0, lse -inf and zero gradients. Both are
        differentiable in query, key, value, prefix_key and prefix_value; a prefix's gradient is summed over all rows
        in float32 and returned in the prefix's dtype. Under autocast all inputs are cast to its dtype.

    Raises:
        ValueError: shapes, values or devices do not fit.
        TypeError: dtypes, types or layouts do not fit.
        NotImplementedError: no backend can run the call (the message has each one's reason), or a gradient of
            `attn_bias` or `sinks` is asked for.

    Source: Prefix-Tuning, Li & Liang 2021 (arXiv 2101.00190).
    """
    problem = checks.checked_problem(
        "prefix_attention",
        query, key, value, (SegmentSet(prefix_key, prefix_value, prefix_ids, prefix_lengths, None, None, False, plan),),
        key_mask=key_mask, attn_bias=attn_bias, is_causal=is_causal, query_offset=query_offset, window=window,
        softcap=softcap, sinks=sinks, dropout_p=dropout_p, scale=scale,
    )  # fmt: skip
    return _run(problem, backend, return_lse)


def segment_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: Segment | list[Segment] | tuple[Segment, ...],
    *,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    key_mask: Tensor | None = None,
    attn_bias: Tensor | None = None,
    is_causal: bool = True,
    query_offset: Tensor | int | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    dropout_p: float = 0.0,
    scale: float | None = None,
    backend: str = "auto",
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of every row to its segment of each set, outermost first, and then to its own tokens; one softmax.

    The general form of `prefix_attention`, which has the formula and the arguments not listed here. Two sets are, for
    example, a task's prefix and a document that a group of rows shares.

    Args:
        query, key, value: [B, H, Tq, D], [B, Hkv, Tk, D]; or packed rows: [total_q, H, D], [total_k, Hkv, D].
        segments: the sets, each a `Segment`; none, one or several.
        cu_seqlens_q, cu_seqlens_k: [B + 1] offsets of packed rows, from 0 to the total. `key_mask` and `attn_bias` do
            not apply to packed rows.
        max_seqlen_q, max_seqlen_k: at least the longest packed row. None: read from the offsets where needed.

    Returns:
        out like query and, with `return_lse`, lse [B, H, Tq], packed [total_q, H].

    Raises:
        ValueError, TypeError, NotImplementedError: as in `prefix_attention`.
    """
    problem = checks.checked_problem(
        "segment_attention",
        query, key, value, _segment_sets(segments),
        cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k, max_seqlen_q=max_seqlen_q, max_seqlen_k=max_seqlen_k,
        key_mask=key_mask, attn_bias=attn_bias, is_causal=is_causal, query_offset=query_offset, window=window,
        softcap=softcap, sinks=sinks, dropout_p=dropout_p, scale=scale,
    )  # fmt: skip
    return _run(problem, backend, return_lse)


def _segment_sets(segments: Segment | list[Segment] | tuple[Segment, ...]) -> tuple[SegmentSet, ...]:
    if isinstance(segments, Segment):
        segments = (segments,)
    if not isinstance(segments, (list, tuple)) or not all(isinstance(s, Segment) for s in segments):
        raise TypeError(
            f"segment_attention: expected segments to be a Segment or a list of them, got {type(segments).__name__}"
        )
    return tuple(
        SegmentSet(s.key, s.value, s.ids, s.lengths, s.cu_seqlens, s.bias, s.in_window, s.plan) for s in segments
    )


def _run(problem: Problem, backend: str, return_lse: bool) -> Tensor | tuple[Tensor, Tensor]:
    out, lse = dispatch.segment_attention(problem, backend)
    return (out, lse) if return_lse else out
