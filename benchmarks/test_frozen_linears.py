"""The linear layers of a frozen GPT-2, forward and gradient of the input, against the same layers unpatched."""

from typing import Any

import pytest
import torch
from compare import Contender, compare
from hosts import QUICK_STEP, STEP, Size, base_model
from torch import Tensor, nn

from prefix_fast import linears
from prefix_fast.models.linears import step_in

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


class FrozenLayers:
    """The four linear layers of every block on `rows` positions each."""

    def __init__(self, size: Size, dtype: torch.dtype, rows: int, patched: bool) -> None:
        model = base_model(size).requires_grad_(False).to(dtype)
        if patched:
            step_in(model)
        blocks = model.transformer.h
        self.layers = [part for block in blocks for part in (block.attn.c_attn, block.attn.c_proj, *_mlp(block))]
        generator = torch.Generator().manual_seed(0)
        self.inputs = [
            torch.randn(rows, layer.nx, generator=generator).to(dtype).requires_grad_() for layer in self.layers
        ]
        self.gradients = [torch.randn(rows, layer.nf, generator=generator).to(dtype) for layer in self.layers]

    def __call__(self) -> tuple[Tensor, ...]:
        """Output and input gradient of the last layer; all are computed."""
        for layer, x, dy in zip(self.layers, self.inputs, self.gradients, strict=True):
            out = layer(x)
            (dx,) = torch.autograd.grad(out, x, dy)
        return out.detach(), dx


class Activations:
    """The GELU of every block, forward and gradient."""

    def __init__(self, size: Size, dtype: torch.dtype, rows: int, patched: bool) -> None:
        model = base_model(size).requires_grad_(False)
        if patched:
            step_in(model)
        self.activations = [block.mlp.act for block in model.transformer.h]
        self.x = torch.randn(rows, 4 * model.config.n_embd, generator=torch.Generator().manual_seed(0))
        self.x = self.x.to(dtype).requires_grad_()

    def __call__(self) -> tuple[Tensor, ...]:
        """Output and input gradient of the last one; all are computed."""
        for activation in self.activations:
            out = activation(self.x)
            (dx,) = torch.autograd.grad(out, self.x, torch.ones_like(out))
        return out.detach(), dx


def _mlp(block: nn.Module) -> tuple[nn.Module, nn.Module]:
    return block.mlp.c_fc, block.mlp.c_proj


@pytest.mark.parametrize("rows", [1024, 16], ids=["R1024", "R16"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_frozen_linears(benchmark: Any, record: Any, quick: bool, dtype: torch.dtype, rows: int) -> None:
    size = QUICK_STEP if quick else STEP
    ours = FrozenLayers(size, dtype, rows, patched=True)
    used = {linears.library_of(product) for product in linears.products_of([dtype])}
    record(
        compare(
            benchmark,
            group="frozen linears",
            case=f"GPT-2 {size.layers} layers, {rows} rows, {str(dtype).removeprefix('torch.')}, fwd + dx",
            ours=Contender("patched", ours),
            rivals=[Contender("Conv1D", FrozenLayers(size, dtype, rows, patched=False))],
            rounds=2 if quick else 12 if rows > 100 else 100,
            tolerance=TOLERANCE[dtype],
            notes={"libraries": "+".join(sorted(used))},
        )
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_fused_gelu(benchmark: Any, record: Any, quick: bool, dtype: torch.dtype) -> None:
    size, rows = (QUICK_STEP, 16) if quick else (STEP, 1024)
    record(
        compare(
            benchmark,
            group="GELU",
            case=f"GPT-2 {size.layers} layers, {rows} rows, {str(dtype).removeprefix('torch.')}, fwd + dx",
            ours=Contender("patched", Activations(size, dtype, rows, patched=True)),
            rivals=[Contender("NewGELUActivation", Activations(size, dtype, rows, patched=False))],
            rounds=2 if quick else 12,
            tolerance=TOLERANCE[dtype],
        )
    )
