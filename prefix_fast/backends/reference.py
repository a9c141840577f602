"""The oracle: attention over segments in plain PyTorch, differentiated by PyTorch. Slow, for reading, on any device.

    s_ij = scale * q_i . k_j, softcapped, plus bias, -inf where key j is hidden from query i
    lse_i = log sum_j exp(s_ij)            out_i = sum_j exp(s_ij - lse_i) v_j

where j runs over the keys of the row's segment of every set and then over the row's own tokens. All arithmetic is
float32 (float64 for float64 inputs). The row's segments are gathered and concatenated here, on purpose: this file
shows what is computed, the other backends how to do it without.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from prefix_fast.backends.problem import Facts, Grads, Problem, SegmentSet

NAME = "reference"


def availability() -> str | None:
    """None: the oracle runs wherever PyTorch does."""
    return None


def device() -> str:
    """Device type of the tensors it takes: all."""
    return "any"


def unsupported_reasons(facts: Facts) -> list[str]:
    """Nothing is refused."""
    return []


def forward(problem: Problem, out: Tensor, lse: Tensor) -> None:
    """Write the output and the log-sum-exp."""
    computed_out, computed_lse = attention(problem)
    out.copy_(computed_out)
    lse.copy_(computed_lse)


def backward(
    problem: Problem, out: Tensor, lse: Tensor, grad_out: Tensor, grad_lse: Tensor | None, grads: Grads
) -> None:
    """Recompute the forward under autograd and write the wanted gradients."""
    sources = [problem.query, problem.key, problem.value]
    targets = [grads.query, grads.key, grads.value]
    for segment_set, (grad_key, grad_value) in zip(problem.sets, grads.sets, strict=True):
        sources += [segment_set.key, segment_set.value]
        targets += [grad_key, grad_value]
    with _AutogradInsideOperator():
        leaves = [t.detach().requires_grad_(target is not None) for t, target in zip(sources, targets, strict=True)]
        query, key, value, *of_sets = leaves
        sets = tuple(
            replace(s, key=k, value=v) for s, k, v in zip(problem.sets, of_sets[::2], of_sets[1::2], strict=True)
        )
        wanted = [leaf for leaf in leaves if leaf.requires_grad]
        copy = replace(problem, query=query, key=key, value=value, sets=sets)
        computed = gradients(copy, wanted, grad_out, grad_lse)
    for target, grad in zip((t for t in targets if t is not None), computed, strict=True):
        target.copy_(grad)


def gradients(
    problem: Problem,
    inputs: list[Tensor],
    grad_out: Tensor,
    grad_lse: Tensor | None,
    create_graph: bool = False,
) -> tuple[Tensor, ...]:
    """Gradients with respect to `inputs`, which are tensors of the problem. Differentiable with `create_graph`."""
    with torch.enable_grad():
        outputs = attention(problem)
    if grad_lse is None:
        grad_lse = torch.zeros_like(outputs[1])
    used = [(o, g) for o, g in zip(outputs, (grad_out, grad_lse), strict=True) if o.requires_grad]
    if not used:  # no query sees any key
        return tuple(torch.zeros_like(t) for t in inputs)
    return torch.autograd.grad(
        [o for o, _ in used], inputs, [g for _, g in used],
        create_graph=create_graph, allow_unused=True, materialize_grads=True,
    )  # fmt: skip


class _AutogradInsideOperator:
    """Let autograd record inside an operator's kernel, which runs below the autograd dispatch keys."""

    def __enter__(self) -> None:
        exclude = torch._C._dispatch_tls_local_exclude_set()
        for key in (
            "AutogradFunctionality",
            "AutogradCPU",
            "AutogradCUDA",
            "AutogradOther",
            "ADInplaceOrView",
        ):
            exclude = exclude.remove(getattr(torch._C.DispatchKey, key))
        self._guard = torch._C._ForceDispatchKeyGuard(torch._C._dispatch_tls_local_include_set(), exclude)
        self._guard.__enter__()

    def __exit__(self, *exc_info: object) -> None:
        self._guard.__exit__(*exc_info)


class _Keys(NamedTuple):
    """The keys of one set as every row sees them: S keys a row."""

    key: Tensor  # [B, Hkv, S, D]
    value: Tensor
    visible: Tensor  # bool, broadcastable to [B, H, Tq, S]
    bias: Tensor | None


def attention(problem: Problem, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """(out, lse) as a differentiable function; out in query's dtype, lse in `dtype`, in which everything is computed.

    None: float32, and float64 for float64 inputs.
    """
    if dtype is None:
        dtype = torch.float64 if problem.query.dtype == torch.float64 else torch.float32
    query, query_count = _dense_rows(problem.query, problem.cu_seqlens_q, problem.max_seqlen_q)
    key, key_count = _dense_rows(problem.key, problem.cu_seqlens_k, problem.max_seqlen_k)
    value, _ = _dense_rows(problem.value, problem.cu_seqlens_k, problem.max_seqlen_k)
    query_position = _query_positions(problem, query, query_count, key_count)
    parts = _segment_keys(problem, query_position)
    parts.append(_own_keys(problem, key, value, query_position, key_count))

    with torch.autocast(query.device.type, enabled=False):  # inputs were cast already; `dtype` holds in here
        out, lse = _softmax_over_parts(problem, query.to(dtype), [_in_dtype(part, dtype) for part in parts])
    out = out.to(problem.query.dtype)
    if problem.cu_seqlens_q is not None:
        row, token = _token_index(problem.cu_seqlens_q, problem.query.shape[0])
        out, lse = out[row, :, token], lse[row, :, token]
    return out, lse


def _in_dtype(part: _Keys, dtype: torch.dtype) -> _Keys:
    return part._replace(key=part.key.to(dtype), value=part.value.to(dtype))


def _softmax_over_parts(problem: Problem, query: Tensor, parts: list[_Keys]) -> tuple[Tensor, Tensor]:
    rows, heads, tokens, _ = query.shape
    scores = torch.cat([_scores(problem, query, part) for part in parts], dim=-1)
    sink = None if problem.sinks is None else problem.sinks.to(query.dtype).view(1, heads, 1, 1)
    if scores.shape[-1] == 0:
        return torch.zeros_like(query), query.new_full((rows, heads, tokens), -torch.inf)
    maximum = scores.detach().amax(dim=-1, keepdim=True)
    some_key = maximum != -torch.inf  # true for NaN, which must show
    if sink is not None:
        maximum = torch.maximum(maximum, sink)
    maximum = torch.where(maximum != -torch.inf, maximum, 0)
    weight = torch.exp(scores - maximum)
    total = weight.sum(dim=-1, keepdim=True)
    if sink is not None:
        total = total + torch.exp(sink - maximum)
    total = torch.where(some_key, total, 1)
    if problem.dropout_p > 0:
        weight = weight * _dropout_factor(problem, query, [part.key.shape[2] for part in parts])
    values = torch.cat([_per_query_head(part.value, heads) for part in parts], dim=2)
    out = torch.where(some_key, weight / total @ values, 0)
    lse = torch.where(some_key, maximum + total.log(), -torch.inf).squeeze(-1)
    return out, lse


def _scores(problem: Problem, query: Tensor, part: _Keys) -> Tensor:
    scores = problem.scale * (query @ _per_query_head(part.key, query.shape[1]).transpose(-1, -2))
    if problem.softcap is not None:
        scores = problem.softcap * torch.tanh(scores / problem.softcap)
    if part.bias is not None:
        scores = scores + part.bias.to(scores.dtype)
    return scores.masked_fill(~part.visible, -torch.inf)


def _per_query_head(keys: Tensor, heads: int) -> Tensor:
    group = heads // keys.shape[1] if keys.shape[1] else 1
    return keys.repeat_interleave(group, dim=1)


def _query_positions(problem: Problem, query: Tensor, query_count: Tensor, key_count: Tensor) -> Tensor:
    """Position of each query among its row's own tokens, [B, Tq]."""
    offset = problem.query_offset
    if offset is None:
        offset = key_count - query_count
    elif not isinstance(offset, Tensor):
        offset = torch.full_like(key_count, offset)
    tokens = torch.arange(query.shape[2], device=query.device)
    return offset.to(torch.int64).expand(query.shape[0])[:, None] + tokens


def _segment_keys(problem: Problem, query_position: Tensor) -> list[_Keys]:
    """The chosen segment of every set. Windowed sets end where the own tokens, or the next windowed set, begin."""
    parts: list[_Keys] = []
    begin = query_position.new_zeros(query_position.shape[0])
    for segment_set in reversed(problem.sets):
        key, value, length = _chosen_segment(segment_set, problem.num_rows)
        index = torch.arange(key.shape[2], device=key.device)
        visible = index < length[:, None]
        key, value = (torch.where(visible[:, None, :, None], t, 0) for t in (key, value))
        visible = visible[:, None, None, :]
        if segment_set.in_window and problem.window is not None:
            begin = begin - length
            position = begin[:, None] + index
            visible = visible & (position[:, None, :] > query_position[..., None] - problem.window)[:, None]
        parts.append(_Keys(key, value, visible, segment_set.bias))
    return parts[::-1]


def _chosen_segment(segment_set: SegmentSet, rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """key, value [B, Hkv, P, D] of the segment that each row reads, and its valid length [B], 0 without one."""
    key, count = _dense_rows(segment_set.key, segment_set.cu_seqlens, None)
    value, _ = _dense_rows(segment_set.value, segment_set.cu_seqlens, None)
    if segment_set.lengths is not None:
        count = torch.minimum(segment_set.lengths.to(torch.int64).clamp(min=0), count)
    if segment_set.ids is None:
        ids = count.new_zeros(rows)
    else:
        ids = segment_set.ids.to(torch.int64)
    chosen = (ids >= 0) & (ids < key.shape[0])
    if key.shape[0] == 0:
        empty = key.new_zeros((rows, *key.shape[1:]))
        return empty, empty, torch.zeros_like(ids)
    ids = torch.where(chosen, ids, 0)
    return key[ids], value[ids], torch.where(chosen, count[ids], 0)


def _own_keys(problem: Problem, key: Tensor, value: Tensor, query_position: Tensor, key_count: Tensor) -> _Keys:
    index = torch.arange(key.shape[2], device=key.device)
    present = index < key_count[:, None]
    if problem.key_mask is not None:
        present = present & problem.key_mask
    key, value = (torch.where(present[:, None, :, None], t, 0) for t in (key, value))
    visible = present[:, None, :]
    if problem.is_causal:
        visible = visible & (index <= query_position[..., None])
    if problem.window is not None:
        visible = visible & (index > query_position[..., None] - problem.window)
    return _Keys(key, value, visible[:, None], problem.attn_bias)


def _dense_rows(tokens: Tensor, cu_seqlens: Tensor | None, longest: int | None) -> tuple[Tensor, Tensor]:
    """Tokens as [rows, heads, T, D] and the count of each row; packed rows are padded to the longest."""
    if cu_seqlens is None:
        return tokens, torch.full((tokens.shape[0],), tokens.shape[2], dtype=torch.int64, device=tokens.device)
    offsets = cu_seqlens.to(torch.int64)
    count = offsets.diff()
    if longest is None:
        longest = int(count.max()) if count.numel() else 0
    index = offsets[:-1, None] + torch.arange(longest, device=tokens.device)
    padded = tokens[index.clamp(max=max(tokens.shape[0] - 1, 0))] if tokens.shape[0] else None
    if padded is None:
        padded = tokens.new_zeros((count.shape[0], longest, *tokens.shape[1:]))
    return padded.transpose(1, 2), count


def _token_index(cu_seqlens: Tensor, total: int) -> tuple[Tensor, Tensor]:
    """Row and position in its row of each packed token."""
    offsets = cu_seqlens.to(torch.int64)
    token = torch.arange(total, device=offsets.device)
    row = torch.searchsorted(offsets, token, right=True) - 1
    return row, token - offsets[row]


def _dropout_factor(problem: Problem, query: Tensor, key_counts: list[int]) -> Tensor:
    """0 or 1 / (1 - p) for each weight, [B, H, Tq, sum of key_counts], from `philox`."""
    rows, heads, tokens, _ = query.shape
    device = query.device
    row_head = torch.arange(rows * heads, device=device).view(rows, heads, 1, 1)
    token = torch.arange(tokens, device=device).view(1, 1, tokens, 1)
    seed = problem.dropout_seed
    if seed is None:
        raise ValueError("segment_attention: expected a dropout_seed with dropout_p > 0, got None")
    kept = []
    for part, count in enumerate(key_counts):
        index = torch.arange(count, device=device)
        words = philox(seed, token, index >> 2, row_head, torch.full_like(index, part))
        word = torch.gather(torch.stack(words), 0, (index & 3).expand(1, rows, heads, tokens, count))[0]
        kept.append(word >= int(problem.dropout_p * 2**32))
    return torch.cat(kept, dim=-1).to(query.dtype) / (1 - problem.dropout_p)


def philox(seed: Tensor, *counter: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10: four uint32 words, as int64, for each counter (c0, c1, c2, c3) under a 64-bit seed.

    Source: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3".
    """
    low32 = 0xFFFFFFFF
    key0, key1 = seed & low32, (seed >> 32) & low32
    c0, c1, c2, c3 = torch.broadcast_tensors(*counter)
    for _ in range(10):
        product0, product1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57  # wraps modulo 2^64, which keeps all 64 bits
        c0, c1, c2, c3 = (
            ((product1 >> 32) & low32) ^ c1 ^ key0,
            product1 & low32,
            ((product0 >> 32) & low32) ^ c3 ^ key1,
            product0 & low32,
        )
        key0, key1 = (key0 + 0x9E3779B9) & low32, (key1 + 0xBB67AE85) & low32
    return c0, c1, c2, c3
