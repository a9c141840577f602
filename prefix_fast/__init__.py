"""prefix_fast: attention to keys and values that many rows of a batch share, without copying them."""

from prefix_fast.dispatch import BackendInfo, backends
from prefix_fast.functional import Segment, prefix_attention, segment_attention

__all__ = ["BackendInfo", "Segment", "backends", "prefix_attention", "segment_attention"]
