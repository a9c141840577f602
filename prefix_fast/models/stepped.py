"""Parts of a patched model that compute otherwise than their class does."""

from __future__ import annotations

from prefix_fast.models import hosts


class Stepped(hosts.SteppedAside):
    """A module that computes the same in a faster way; `linears.step_out` gives it its own class back."""
