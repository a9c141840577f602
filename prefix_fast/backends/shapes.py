"""What is static about a call, and the pairs and bytes that follow from it; the cost models count with these."""

from __future__ import annotations

from typing import NamedTuple


class Shape(NamedTuple):
    """What is static about a call. Packed sets count as segments of their average length."""

    rows: int  # B
    heads: int  # H
    kv_heads: int  # Hkv
    queries: int  # Tq
    keys: int  # Tk
    head_dim: int
    element: int  # bytes of one number of query, key and value
    sets: tuple[tuple[int, int], ...]  # (N, P) of each shared set
    causal: bool = True
    tf32: bool = False

    @property
    def lengths(self) -> tuple[int, ...]:
        """Keys of a row's chain: its segment of each set, then its own."""
        return (*(size for _, size in self.sets), self.keys)

    @property
    def shared_pairs(self) -> int:
        """(query, key) pairs of one head over the shared segments, all rows together."""
        return self.rows * self.queries * sum(size for _, size in self.sets)

    @property
    def pairs(self) -> int:
        """Visible (query, key) pairs of one head, all rows together; the last query sees all keys of its row."""
        own = self.queries * self.keys
        if self.causal:
            seeing = min(self.queries, self.keys)
            own = seeing * self.keys - seeing * (seeing - 1) // 2
        return self.shared_pairs + self.rows * own

    @property
    def shared_bytes(self) -> float:
        """Of the keys and values of all shared segments."""
        return 2 * self.kv_heads * self.head_dim * self.element * sum(count * size for count, size in self.sets)

    @property
    def own_bytes(self) -> float:
        """Of the rows' own keys and values."""
        return 2 * self.rows * self.kv_heads * self.keys * self.head_dim * self.element

    @property
    def query_bytes(self) -> float:
        """Of the queries; as many as of the output."""
        return self.rows * self.heads * self.queries * self.head_dim * self.element
