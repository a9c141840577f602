"""The operator on the CPU against concatenation + SDPA, merges of PyTorch's own pieces, and the machine's limits."""

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from compare import Contender, compare
from limits import limits_of
from rivals import gemm_merge, merge
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from prefix_fast import prefix_attention
from prefix_fast.backends.shapes import Shape
from prefix_fast.prediction import label
from prefix_fast.speed import concatenation_attention, visible_keys

GPT2, GROUPED, LLAMA = (12, 12, 64), (12, 4, 64), (32, 8, 128)  # H, Hkv, D
CONCATENATION, MERGE = "concatenation + SDPA", "torch flash, merged by lse"
CACHED, GEMM = "SDPA, cache concatenated before", "torch GEMMs, merged by sums"
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2}


class Call(NamedTuple):
    """A call of the operator. Decoding has one query a row."""

    B: int
    Tq: int
    Tk: int
    P: int
    heads: tuple[int, int, int] = GPT2
    dtype: torch.dtype = torch.float32
    dropout: float = 0.0

    @property
    def shape(self) -> Shape:
        """As the cost model takes it."""
        H, Hkv, D = self.heads
        return Shape(self.B, H, Hkv, self.Tq, self.Tk, D, self.dtype.itemsize, ((1, self.P),))

    @property
    def plain(self) -> bool:
        """Whether the rivals that merge parts serve it."""
        return self.dropout == 0 and self.heads[0] == self.heads[1]

    def __str__(self) -> str:
        parts = [label(self.shape)]
        parts += ["bfloat16"] if self.dtype == torch.bfloat16 else []
        parts += [f"dropout {self.dropout:g}"] if self.dropout else []
        return " ".join(parts)

    def small(self) -> "Call":
        """The same kind of call in little time."""
        few = self._replace(B=2, P=min(self.P, 64))
        return few._replace(Tk=16) if self.Tq == 1 else few._replace(Tq=16, Tk=16)

    def tensors(self, grad: bool) -> list[Tensor]:
        """query, key, value, prefix_key, prefix_value."""
        H, Hkv, D = self.heads
        sizes = [
            (self.B, H, self.Tq),
            (self.B, Hkv, self.Tk),
            (self.B, Hkv, self.Tk),
            (1, Hkv, self.P),
            (1, Hkv, self.P),
        ]
        return [torch.randn(*size, D).to(self.dtype).requires_grad_(grad) for size in sizes]


def training(T: int, P: int, B: int = 8, **others: Any) -> Call:
    """Every query sees the prefix and the row's tokens up to its own."""
    return Call(B, T, T, P, **others)


PLAIN = [training(128, 10), training(128, 200), training(128, 1024), training(512, 200)]
CALLS = [
    *PLAIN,
    *(call._replace(dtype=torch.bfloat16) for call in PLAIN),
    *(training(T, P, dropout=0.1) for T, P in ((128, 10), (128, 200), (512, 200))),
    *(training(128, 200, heads=(12, 12, D)) for D in (80, 96, 128, 256)),
    training(128, 200, heads=GROUPED),
    training(128, 200, B=2, heads=LLAMA),
    training(128, 200, B=1),
]
HEADLINES = {*PLAIN, PLAIN[1]._replace(dtype=torch.bfloat16), training(128, 200, dropout=0.1)}
DECODES = [
    Call(64, 1, 64, 1024),
    Call(64, 1, 64, 1024, dtype=torch.bfloat16),
    Call(32, 1, 64, 1024, heads=LLAMA),
    Call(1, 1, 64, 1024),
]


def contender(
    name: str, function: Callable[..., Tensor], tensors: list[Tensor], grad_out: Tensor | None, dropout: float = 0.0
) -> Contender:
    """The function's forward, and its backward to all five tensors where grad_out is given.

    With dropout, `function(*tensors, dropout_p)` is timed, and compared without.
    """

    def run(dropout_p: float) -> tuple[Tensor, ...]:
        arguments = (*tensors, dropout_p) if dropout > 0 else tensors
        if grad_out is None:
            with torch.no_grad():
                return (function(*arguments),)
        out = function(*arguments)
        return (out.detach(), *torch.autograd.grad(out, tensors, grad_out))

    return Contender(name, lambda: run(dropout), check=lambda: run(0.0))


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward-backward"])
@pytest.mark.parametrize("call", CALLS, ids=lambda call: str(call).replace(" ", "-"))
def test_training(benchmark: Any, record: Any, quick: bool, call: Call, backward: bool) -> None:
    headline = backward and call in HEADLINES
    call = call.small() if quick else call
    tensors = call.tensors(grad=backward)
    # The mask is made once, outside the timed part: a model makes one for all its layers.
    mask = visible_keys(tensors[0], tensors[1], tensors[3])
    grad_out = torch.randn_like(tensors[0]) if backward else None

    def ours(*args: Any) -> Tensor:
        return prefix_attention(*args[:5], dropout_p=args[5] if len(args) > 5 else 0.0)

    def concatenation(*args: Any) -> Tensor:
        return concatenation_attention(*args[:5], mask, dropout_p=args[5] if len(args) > 5 else 0.0)

    rivals = [contender(CONCATENATION, concatenation, tensors, grad_out, call.dropout)]
    if call.plain:
        rivals.append(contender(MERGE, merge, tensors, grad_out))
    record(
        compare(
            benchmark,
            group="operator",
            case=f"{'forward + backward' if backward else 'forward'}, {call}",
            ours=contender("prefix_attention", ours, tensors, grad_out, call.dropout),
            rivals=rivals,
            rounds=2 if quick else 12,
            tolerance=TOLERANCE[call.dtype],
            headlines=[CONCATENATION] if headline else [],
            limits=limits_of(call.shape, call.dtype, forward=True, backward=backward, dropout=call.dropout > 0),
        )
    )


@pytest.mark.parametrize("call", DECODES, ids=lambda call: str(call).replace(" ", "-"))
def test_decode(benchmark: Any, record: Any, quick: bool, call: Call) -> None:
    headline = call == DECODES[0]
    call = call.small() if quick else call
    tensors = call.tensors(grad=False)
    mask = visible_keys(tensors[0], tensors[1], tensors[3])
    keys, values = (torch.cat([tensors[i + 2].expand(call.B, -1, -1, -1), tensors[i]], 2) for i in (1, 2))
    grouped = call.heads[0] != call.heads[1]

    def cached(*args: Tensor) -> Tensor:
        return scaled_dot_product_attention(args[0], keys, values, enable_gqa=grouped)

    rivals = {CONCATENATION: lambda *args: concatenation_attention(*args, mask), CACHED: cached}
    if call.plain:
        rivals |= {MERGE: merge, GEMM: gemm_merge}
    record(
        compare(
            benchmark,
            group="decode step",
            case=str(call),
            ours=contender("prefix_attention", prefix_attention, tensors, None),
            rivals=[contender(name, function, tensors, None) for name, function in rivals.items()],
            rounds=2 if quick else 20,
            tolerance=TOLERANCE[call.dtype],
            headlines=[CONCATENATION, CACHED] if headline else [],
            limits=limits_of(call.shape, call.dtype, forward=True, backward=False),
        )
    )
