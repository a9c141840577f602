"""What a backend receives: one attention call over segment sets, normalised and checked.

Dimensions: B rows, H query heads, Hkv key/value heads (H a multiple of Hkv), Tq / Tk query / own key tokens of a row,
N segments of a set, P (padded) segment length, D head dim.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class Plan(NamedTuple):
    """Who reads what: the rows of a batch by the segment that each reads. Made by `make_plan`, on the ids' device.

    It depends on ids alone, so one plan serves every layer of a model's forward pass and its backward pass.
    """

    order: Tensor  # [B] rows in order of their segment, those that read none last; of one segment, in their own order
    starts: Tensor  # [N + 2] first entry in `order` of each segment's rows, of the rows that read none, and B


def make_plan(ids: Tensor, num_segments: int) -> Plan:
    """The plan of a segment set: its rows sorted by segment, without a wait for the device (CUDA graphs capture it).

    Args:
        ids: [B] integers; a row whose id is outside [0, N) reads no segment.
        num_segments: N.
    """
    readable = (ids >= 0) & (ids < num_segments)
    units = torch.where(readable, ids.to(torch.int32), num_segments)
    ordered, order = torch.sort(units, stable=True)
    bounds = torch.arange(num_segments + 2, dtype=torch.int32, device=ids.device)
    return Plan(order.to(torch.int32), torch.searchsorted(ordered, bounds, out_int32=True))


@dataclass(frozen=True)
class SegmentSet:
    """N segments of keys and values, of which every row reads one (or none) before its own tokens."""

    key: Tensor  # [N, Hkv, P, D], or packed [total, Hkv, D] when cu_seqlens is given
    value: Tensor
    ids: Tensor | None  # [B] integers, -1: the row reads nothing of this set; None: every row reads segment 0
    lengths: Tensor | None  # [N] valid keys; None: all of the segment
    cu_seqlens: Tensor | None  # [N + 1] offsets into `total`
    bias: Tensor | None  # additive, broadcastable to [B, H, Tq, P]
    in_window: bool  # the keys are positions before the row's own and can leave the window
    plan: Plan | None = None  # of ids; None: a backend that needs one makes it

    @property
    def count(self) -> int:
        """N, the number of segments."""
        return self.key.shape[0] if self.cu_seqlens is None else self.cu_seqlens.shape[0] - 1


@dataclass(frozen=True)
class Problem:
    """One call. Shapes and types were checked by `functional`, values of ids and lengths by `check_values`."""

    query: Tensor  # [B, H, Tq, D], or packed [total_q, H, D]
    key: Tensor  # [B, Hkv, Tk, D], or packed [total_k, Hkv, D]
    value: Tensor
    sets: tuple[SegmentSet, ...]  # outermost first
    cu_seqlens_q: Tensor | None  # [B + 1]; both or neither
    cu_seqlens_k: Tensor | None
    max_seqlen_q: int | None
    max_seqlen_k: int | None
    key_mask: Tensor | None  # [B, Tk] bool, True: may be attended
    attn_bias: Tensor | None  # additive, broadcastable to [B, H, Tq, Tk], own tokens only
    is_causal: bool  # own key j is visible to query i when j <= i + offset
    query_offset: Tensor | int | None  # int, or integer tensor, 0-dim or [B]; None: Tk - Tq of the row
    window: int | None  # own key j also needs j > i + offset - window
    softcap: float | None
    sinks: Tensor | None  # [H]
    dropout_p: float
    dropout_seed: Tensor | None  # int64 [1]; None without dropout
    scale: float

    @property
    def num_rows(self) -> int:
        """B."""
        return self.query.shape[0] if self.cu_seqlens_q is None else self.cu_seqlens_q.shape[0] - 1


@dataclass(frozen=True)
class Grads:
    """Where `backward` writes. None: not wanted, and not computed."""

    query: Tensor | None
    key: Tensor | None
    value: Tensor | None
    sets: tuple[tuple[Tensor | None, Tensor | None], ...]

    def are_zeros(self, out: Tensor) -> bool:
        """Whether nothing is to be computed: `out` or every gradient is empty. The wanted ones are then zeros."""
        of_sets = (tensor for pair in self.sets for tensor in pair)
        wanted = [tensor for tensor in (self.query, self.key, self.value, *of_sets) if tensor is not None]
        if out.numel() > 0 and any(tensor.numel() > 0 for tensor in wanted):
            return False
        for tensor in wanted:
            tensor.zero_()
        return True


class Facts(NamedTuple):
    """The static facts by which a backend accepts or refuses a call; plain constants, so that tracing can fold them."""

    device: str
    dtype: torch.dtype
    head_dim: int
    uses: tuple[str, ...]  # of: softcap, window, sinks, segment_bias, dropout, packed, mixed_prefix, many_sets
    device_index: int = 0  # among those of its type
    few_queries: bool = False  # of a row; asked of CUDA tensors alone


def check_values(problem: Problem) -> None:
    """Check the values of ids, lengths and offsets where reading them costs nothing.

    On the CPU always; on a device only with PREFIX_FAST_DEBUG=1, because a read there waits for the device.

    Raises:
        ValueError: an id outside [-1, N), a length outside [0, P], or offsets that do not ascend from 0 to the total.
    """
    if problem.query.device.type != "cpu" and os.environ.get("PREFIX_FAST_DEBUG") != "1":
        return
    for index, segment_set in enumerate(problem.sets):
        _check_set_values(index, segment_set)
    if problem.cu_seqlens_q is not None and problem.cu_seqlens_k is not None:
        check_offsets("cu_seqlens_q", problem.cu_seqlens_q, problem.query.shape[0])
        check_offsets("cu_seqlens_k", problem.cu_seqlens_k, problem.key.shape[0])
        _check_longest("max_seqlen_q", problem.max_seqlen_q, problem.cu_seqlens_q)
        _check_longest("max_seqlen_k", problem.max_seqlen_k, problem.cu_seqlens_k)


def _check_set_values(index: int, segment_set: SegmentSet) -> None:
    count = segment_set.count
    if segment_set.ids is not None and segment_set.ids.numel() > 0:
        low, high = (int(v) for v in torch.aminmax(segment_set.ids))
        if low < -1 or high >= count:
            raise ValueError(
                f"segment_attention: expected ids of segment set {index} in [-1, {count}), got values from {low} to "
                f"{high}; -1 means that a row reads no segment"
            )
    if segment_set.ids is not None and segment_set.plan is not None:
        true = make_plan(segment_set.ids, count)
        if not all(torch.equal(given.to(made), made) for given, made in zip(segment_set.plan, true, strict=True)):
            raise ValueError(
                f"segment_attention: expected the plan of segment set {index} to be make_plan(ids, {count}), "
                f"got one of other ids; make it again when ids change"
            )
    if segment_set.cu_seqlens is not None:
        check_offsets(f"cu_seqlens of segment set {index}", segment_set.cu_seqlens, segment_set.key.shape[0])
    if segment_set.lengths is not None and segment_set.lengths.numel() > 0:
        if segment_set.cu_seqlens is None:
            limit: Tensor | int = segment_set.key.shape[2]
        else:
            limit = segment_set.cu_seqlens.diff()
        if bool(((segment_set.lengths < 0) | (segment_set.lengths > limit)).any()):
            raise ValueError(
                f"segment_attention: expected lengths of segment set {index} between 0 and the segment's own length "
                f"({limit if isinstance(limit, int) else limit.tolist()}), got {segment_set.lengths.tolist()}"
            )


def check_offsets(name: str, offsets: Tensor, total: int) -> None:
    """Raise ValueError unless `offsets` ascend from 0 to `total`."""
    ascending = bool((offsets.diff() >= 0).all())
    if not ascending or int(offsets[0]) != 0 or int(offsets[-1]) != total:
        raise ValueError(
            f"segment_attention: expected {name} to ascend from 0 to {total}, the number of packed tokens, "
            f"got {offsets.tolist()}"
        )


def _check_longest(name: str, longest: int | None, offsets: Tensor) -> None:
    if longest is not None and offsets.numel() > 1 and int(offsets.diff().max()) > longest:
        raise ValueError(
            f"segment_attention: expected {name} of at least {int(offsets.diff().max())}, the longest packed row, "
            f"got {longest}"
        )
