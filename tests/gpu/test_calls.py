"""Calls of every kind against the float64 truth."""

import os
from dataclasses import replace

import device_calls
import pytest
import torch

from prefix_fast.testing import Case, check, make_problem

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
SEEDS = range(4) if INTERPRETED else range(160)
HEAD_DIMS = (16, 80) if INTERPRETED else (16, 24, 32, 64, 80, 96, 128, 192, 256)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def compare(case: Case, device: str) -> None:
    check(make_problem(case, device), "triton")


@pytest.mark.parametrize("seed", SEEDS)
def test_random_call(seed: int, device: str) -> None:
    """Between margins; the interpreter's tiles are small, and so are its calls: a card's hold several of its tiles."""
    device_calls.check(seed, device, 1 if INTERPRETED else 7)


@pytest.mark.parametrize("prefix_dtype", [None, torch.float32], ids=["same", "fp32_prefix"])
@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_every_head_dim_and_dtype(
    head_dim: int, dtype: torch.dtype, prefix_dtype: torch.dtype | None, device: str
) -> None:
    tokens, prefix = (33, 9) if INTERPRETED else (333, 270)
    compare(
        Case(B=2, H=2, Hkv=1, Tq=tokens, Tk=tokens, P=prefix, D=head_dim, dtype=dtype, prefix_dtype=prefix_dtype),
        device,
    )


@pytest.mark.parametrize("queries", [1, 5] if INTERPRETED else [1, 2, 5, 16])
@pytest.mark.parametrize("group", [4] if INTERPRETED else [1, 4, 16])
def test_few_queries_and_a_long_prefix(queries: int, group: int, device: str) -> None:
    rows, kv_heads, prefix = (2, 1, 70) if INTERPRETED else (33, 2, 3000)
    case = Case(
        B=rows, H=kv_heads * group, Hkv=kv_heads, Tq=queries, Tk=queries + 20, P=prefix, D=64, dtype=torch.float16
    )
    compare(case, device)
    compare(replace(case, N=3, ids="random", lengths="random", key_mask="left"), device)


@pytest.mark.parametrize("prefix", [10, 33] if INTERPRETED else [1, 10, 16, 33, 64, 65])
def test_many_queries_and_a_short_prefix(prefix: int, device: str) -> None:
    rows, heads, tokens = (2, 2, 33) if INTERPRETED else (12, 4, 200)
    compare(Case(B=rows, H=heads, Hkv=heads // 2, Tq=tokens, Tk=tokens, P=prefix, D=64, dtype=torch.bfloat16), device)
