"""Which prefix of several each row of a batch reads, and the prefixes one after another, without padding.

keys, values [L, Hkv, total, D] of a site; segment n is cu_seqlens[n] : cu_seqlens[n + 1] of the tokens
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from prefix_fast.backends.problem import Plan, make_plan
from prefix_fast.functional import Segment


@dataclass(frozen=True)
class Choice:
    """Which segment each row of a batch reads; made once per forward, for all layers.

    Attributes:
        ids: [B] in [-1, N); -1: the row reads none.
        lengths: [B, 1] tokens of each row's segment, 0 for none.
        cu_seqlens: [N + 1].
        plan: of the ids, where the kernels take one.
        names: of the N segments.
        sizes: tokens of the N segments, known without asking a device.
    """

    ids: Tensor
    lengths: Tensor
    cu_seqlens: Tensor
    plan: Plan | None
    names: tuple[str, ...]
    sizes: tuple[int, ...]

    @classmethod
    def of(cls, ids: Tensor, names: Sequence[str], sizes: Sequence[int]) -> Choice:
        """The choice of rows with these ids among segments of these sizes."""
        offsets = torch.tensor([0, *accumulate(sizes)], dtype=torch.int32, device=ids.device)
        # One entry more, of length 0, for the rows that read none, and for ids out of range, as a GPU may hold them.
        known = torch.where((ids >= 0) & (ids < len(sizes)), ids, len(sizes))
        lengths = torch.tensor([*sizes, 0], dtype=torch.long, device=ids.device)[known.long()]
        return cls(ids, lengths.unsqueeze(1), offsets, _plan(ids, len(sizes)), tuple(names), tuple(sizes))

    def repeated(self, times: int) -> Choice:
        """The choice of a batch in which every row stands `times` times in succession, as beams do."""
        if times == 1:
            return self
        return self.picked(torch.arange(self.ids.shape[0], device=self.ids.device).repeat_interleave(times))

    def picked(self, rows: Tensor) -> Choice:
        """The choice of these rows of the batch."""
        ids = self.ids[rows]
        return replace(self, ids=ids, lengths=self.lengths[rows], plan=_plan(ids, len(self.sizes)))

    def segment(self, keys: Tensor, values: Tensor) -> Segment:
        """One layer's keys and values [Hkv, total, D] as the operator reads them."""
        return Segment(
            keys.transpose(0, 1), values.transpose(0, 1), ids=self.ids, cu_seqlens=self.cu_seqlens, plan=self.plan
        )

    def biased_segment(self, keys: Tensor, values: Tensor, bias: Tensor) -> Segment:
        """The same, padded to the longest, with a bias by distance, which the operator takes of such segments alone.

        Args:
            keys, values: [Hkv, total, D].
            bias: [1, H, Tq, P] of the longest segment. By distance, a shorter one's is the end of it.
        """
        longest = max(self.sizes)
        padded = [
            torch.nn.utils.rnn.pad_sequence(list(part.transpose(0, 1).split(self.sizes)), batch_first=True)
            for part in (keys, values)
        ]
        dense_keys, dense_values = (part.transpose(1, 2) for part in padded)
        biases = [torch.nn.functional.pad(bias[..., longest - size :], (0, longest - size)) for size in self.sizes]
        return Segment(
            dense_keys, dense_values, ids=self.ids, lengths=self.cu_seqlens.diff(), plan=self.plan,
            bias=torch.cat(biases)[self.ids.long().clamp(0, len(self.sizes) - 1)],
        )  # fmt: skip


def _plan(ids: Tensor, count: int) -> Plan | None:
    """On the CPU none: its kernels use none, and would check a given one in every layer."""
    return None if ids.device.type == "cpu" else make_plan(ids, count)


States = Mapping[str, tuple[Tensor, Tensor]]


def pack(prefixes: Sequence[States]) -> dict[str, tuple[Tensor, Tensor]]:
    """Per site, keys and values [L, Hkv, total, D] of prefixes of [L, 1, Hkv, P, D] each."""
    packed = {}
    for site in prefixes[0]:
        keys, values = zip(*(prefix[site] for prefix in prefixes), strict=True)
        packed[site] = (_joined(keys), _joined(values))
    return packed


def _joined(parts: Sequence[Tensor]) -> Tensor:
    parts = [part.squeeze(1) for part in parts]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)


def check_ids(prefix_ids: Any, rows: int | None) -> None:
    """Raise unless these can be the ids of so many rows; None: their number is not known.

    Raises:
        TypeError: neither names or integers for each row nor an integer tensor. ValueError: of another length.
    """
    if isinstance(prefix_ids, Tensor):
        if prefix_ids.dtype.is_floating_point or prefix_ids.dtype.is_complex or prefix_ids.dtype == torch.bool:
            raise TypeError(f"prefix_ids: expected names or integers, got a tensor of {prefix_ids.dtype}")
        if prefix_ids.dim() != 1:
            raise ValueError(f"prefix_ids: expected [B], got a tensor of shape {tuple(prefix_ids.shape)}")
    elif isinstance(prefix_ids, (str, bytes, Mapping)) or not isinstance(prefix_ids, Sequence):
        raise TypeError(
            f"prefix_ids: expected a list with a name or None for each row, or a tensor of integers, got {prefix_ids!r}"
        )
    if rows is not None and len(prefix_ids) != rows:
        raise ValueError(f"prefix_ids: expected one for each of the {rows} rows, got {len(prefix_ids)}")


def names_of(prefix_ids: Any, entries: Mapping[str, Any]) -> list[str | None]:
    """The name that each row's id means: a name, None, or a position among the entries, -1 for none.

    Raises:
        ValueError: an unknown name, a position out of range. TypeError: an id of another type.
    """
    if isinstance(prefix_ids, Tensor):
        prefix_ids = prefix_ids.tolist()
    names = list(entries) if any(not isinstance(given, (str, type(None))) for given in prefix_ids) else []
    return [_name_of(given, entries, names) for given in prefix_ids]


def _name_of(given: Any, entries: Mapping[str, Any], names: list[str]) -> str | None:
    if given is None or (isinstance(given, str) and given in entries):
        return given
    known = f"the bank has {listed(list(entries))}"
    if isinstance(given, str):
        raise ValueError(f"prefix_ids: expected a name in the bank, got {given!r}; {known}")
    try:
        if isinstance(given, bool):
            raise TypeError
        position = operator.index(given)
    except TypeError:
        raise TypeError(f"prefix_ids: expected a name, None or an integer, got {given!r}; {known}") from None
    if not -1 <= position < len(names):
        raise ValueError(f"prefix_ids: expected ids in [-1, {len(names)}), got {given}; {known}")
    return None if position < 0 else names[position]


def listed(names: Sequence[str]) -> str:
    """Names for a message; of many, the first."""
    shown = ", ".join(map(repr, names[:20])) or "no entries"
    return f"{shown} and {len(names) - 20} more" if len(names) > 20 else shown
