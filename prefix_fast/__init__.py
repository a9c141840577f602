"""prefix_fast: attention to keys and values that many rows of a batch share, without copying them."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from prefix_fast.backends.problem import Plan, make_plan
from prefix_fast.bank import PrefixBank
from prefix_fast.dispatch import BackendInfo, backends
from prefix_fast.functional import Segment, prefix_attention, segment_attention
from prefix_fast.kept import keep_attention
from prefix_fast.modules import PrefixAttention
from prefix_fast.prefix import Prefix, PrefixConfig
from prefix_fast.sources import SharedSourceCollator

if TYPE_CHECKING:
    from prefix_fast.patching import patch, unpatch

__all__ = [
    "BackendInfo",
    "Plan",
    "Prefix",
    "PrefixAttention",
    "PrefixBank",
    "PrefixConfig",
    "Segment",
    "SharedSourceCollator",
    "backends",
    "keep_attention",
    "make_plan",
    "patch",
    "prefix_attention",
    "segment_attention",
    "unpatch",
]

_NEEDS_TRANSFORMERS = {"patch": "prefix_fast.patching", "unpatch": "prefix_fast.patching"}


def __getattr__(name: str) -> Any:
    """`patch` and `unpatch`, at their first use: they import transformers, which takes longer than all the rest."""
    if name not in _NEEDS_TRANSFORMERS:
        raise AttributeError(f"module 'prefix_fast' has no attribute {name!r}")
    return getattr(import_module(_NEEDS_TRANSFORMERS[name]), name)
