"""Checks the plain flash attention of benchmarks/static; a program that needs TRITON_INTERPRET=1 before it starts."""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks" / "static"))

import plain_flash

from prefix_fast.backends.triton_config import Tile


def error_of(D: int, T: int, tile: Tile) -> float:
    """Largest difference of the output and the three gradients from PyTorch's attention in float64."""
    query, key, value, grad_out = (torch.randn(2, T, 3, D).transpose(1, 2) for _ in range(4))
    found = plain_flash.attention(query, key, value, grad_out, tile)
    leaves = [t.double().requires_grad_() for t in (query, key, value)]
    out = torch.nn.functional.scaled_dot_product_attention(*leaves, is_causal=True)
    true = (out.detach(), *torch.autograd.grad(out, leaves, grad_out.double()))
    return max(float((a - b).abs().max()) for a, b in zip(found, true, strict=True))


if __name__ == "__main__":
    torch.manual_seed(0)
    for D, T, tile in ((16, 64, Tile(32, 16, 4, 1)), (24, 64, Tile(16, 32, 4, 1)), (32, 96, Tile(32, 32, 4, 1))):
        print(f"{tile}: {error_of(D, T, tile):.1e}")
        if not error_of(D, T, tile) < 5e-6:
            sys.exit("plain flash attention differs from PyTorch's")
