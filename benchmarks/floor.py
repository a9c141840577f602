"""The matrix products with frozen weights that a training step of GPT-2 cannot do without, and nothing else.

Forward and input gradients of every block (of the first, none before its keys and values), of the last block on the
labelled positions after its attention, and the head on these. Times beside a step's say what the step adds to them.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from hosts import Size
from torch import Tensor

HIDDEN = 768


def by_onednn(x: Tensor, matrix: Tensor) -> Tensor:
    """x · Wᵀ through oneDNN."""
    return torch.ops.mkldnn._linear_pointwise(x, matrix, None, "none", [], "")


LIBRARIES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"PyTorch": F.linear, "oneDNN": by_onednn}


class Floor:
    """One step's products through one library; labels on half of the positions."""

    def __init__(self, size: Size, library: str) -> None:
        self.product = LIBRARIES[library]
        tokens, labels = size.rows * size.tokens, size.rows * (size.tokens // 2)
        generator = torch.Generator().manual_seed(0)

        def matrix(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator)

        widths = ((HIDDEN, 3 * HIDDEN), (HIDDEN, HIDDEN), (HIDDEN, 4 * HIDDEN), (4 * HIDDEN, HIDDEN))
        self.products = []  # input, weight as the product reads it
        for block in range(size.layers):
            for part, (inputs, outputs) in enumerate(widths):
                weight = matrix(inputs, outputs)
                rows = labels if block == size.layers - 1 and part > 0 else tokens
                self.products.append((matrix(rows, inputs), weight.t()))
                if (block, part) != (0, 0):
                    self.products.append((matrix(rows, outputs), weight))
        head = matrix(size.vocabulary, HIDDEN)
        self.products += [(matrix(labels, HIDDEN), head), (matrix(labels, size.vocabulary), head.t())]

    @torch.no_grad()
    def __call__(self) -> tuple[Tensor, ...]:
        """Every product; the last one's first row."""
        for x, weight in self.products:
            out = self.product(x, weight)
        return (out[0],)
