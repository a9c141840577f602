"""Activation checkpointing that keeps the outputs of attention: `keep_attention`.

A checkpointed region runs twice, the second time for what the backward pass reads alone. Of attention that is its
inputs, out and lse; with (out, lse) at hand, of the size of one activation, the second run leaves attention out.

PyTorch's own `create_selective_checkpoint_contexts` would do it by watching every operator, which takes its time in
Python and, while it watches, the faster products with frozen weights. torch.compile, which knows no other, gets it.
"""

from __future__ import annotations

import threading
from collections import deque
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor


class Region:
    """What the attention calls of one region left in its first run, in their order: (out, lse) of each."""

    def __init__(self) -> None:
        self._results: deque[tuple[Tensor, Tensor]] = deque()

    def keep(self, out: Tensor, lse: Tensor) -> None:
        """Note a call's results; detached, because the region is held by the graph that they will belong to."""
        self._results.append((out.detach(), lse.detach()))

    def take(self) -> tuple[Tensor, Tensor] | None:
        """The next call's results, once; None: they were taken, by an earlier backward pass of a retained graph."""
        return self._results.popleft() if self._results else None


class Run(AbstractContextManager):
    """One of the two runs of a region, the second of which may be repeated. Regions nest; each keeps its own calls."""

    def __init__(self, region: Region, again: bool) -> None:
        self.region, self.again = region, again
        self._outer: list[Run | None] = []

    def __enter__(self) -> None:
        self._outer.append(current())
        _running.run = self

    def __exit__(self, *_: Any) -> None:
        _running.run = self._outer.pop()


_running = threading.local()


def current() -> Run | None:
    """The run of a region that keeps attention, if this thread is in one."""
    return getattr(_running, "run", None)


def keep_attention() -> tuple[AbstractContextManager, AbstractContextManager]:
    """The contexts of a checkpointed region's two runs, between which the outputs of attention are kept.

        torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False, context_fn=prefix_fast.keep_attention)

    Gradients are the same bit for bit. Each call keeps one activation, [B, H, T, D], and its lse [B, H, T]. Patched
    models take `{"keep_attention": True}` among the keywords of transformers' gradient checkpointing.

    Returns:
        What `context_fn` is to return.
    """
    if torch.compiler.is_compiling():
        from torch.utils.checkpoint import create_selective_checkpoint_contexts

        return create_selective_checkpoint_contexts([torch.ops.prefix_fast.segment_attention.default])
    region = Region()
    return Run(region, again=False), Run(region, again=True)
