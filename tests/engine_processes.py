"""Run by torch.distributed.run on two processes: a patched model under each engine against one process alone."""

import copy
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

sys.path.insert(0, str(Path(__file__).resolve().parent))  # -P keeps it off

from models_zoo import assert_close, make_batch, make_model, make_prefix

from prefix_fast import patch
from prefix_fast.models import linears

STEPS, ROWS, TOKENS = 3, 4, 9
REDUCTIONS = ("reduce_scatter_single", "reduce_scatter_tensor")
Wrap = Callable[[nn.Module, list[int]], nn.Module]


def patched(family: str) -> nn.Module:
    """A patched model in training mode; the same in every process."""
    model = make_model(family)
    return patch(model, make_prefix(model)).train()


def batches() -> list[dict[str, Tensor]]:
    """Joined batches in which every row carries as many labels, so that the mean over processes is that over rows."""
    found = []
    for step in range(STEPS):
        ids = make_batch("none", rows=ROWS, tokens=TOKENS, seed=step).input_ids
        found.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()})
    return found


def own_rows(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """This process's half of a batch."""
    half = ROWS // dist.get_world_size()
    return {name: values[dist.get_rank() * half :][:half] for name, values in batch.items()}


def train(engine: nn.Module, model: nn.Module, data: list[dict[str, Tensor]]) -> list[Tensor]:
    """The loss and the gradients of the prefix in each step."""
    trained = dict(model.named_parameters())
    prefix = [parameter for name, parameter in trained.items() if name.startswith("prefix.")]
    optimizer = torch.optim.SGD(prefix, lr=0.1)
    results = []
    for batch in data:
        loss = engine(**batch).loss
        loss.backward()
        assert all(parameter.grad is None for name, parameter in trained.items() if not name.startswith("prefix."))
        results += [loss.detach(), *(whole(parameter.grad) for parameter in prefix)]
        optimizer.step()
        optimizer.zero_grad()
    return results


def whole(gradient: Tensor) -> Tensor:
    """The gradient of all shards."""
    return gradient.full_tensor() if isinstance(gradient, DTensor) else gradient.clone()


def ddp(model: nn.Module, travelled: list[int]) -> nn.Module:
    """DistributedDataParallel, whose buckets are counted."""

    def hook(group: Any, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        travelled.append(bucket.buffer().numel())
        return allreduce_hook(group, bucket)

    engine = DistributedDataParallel(model)
    engine.register_comm_hook(None, hook)
    return engine


def fsdp2(model: nn.Module, travelled: list[int]) -> nn.Module:
    """Every block and the rest sharded."""
    blocks = model.transformer.h if hasattr(model, "transformer") else model.model.layers
    for block in blocks:
        fully_shard(block)
    return fully_shard(model)


@contextmanager
def counted(travelled: list[int]) -> Iterator[None]:
    """Count what FSDP2 reduces; its name for the collective differs by release."""
    collectives = {name: getattr(dist, name) for name in REDUCTIONS if hasattr(dist, name)}

    def noting(reduce: Callable) -> Callable:
        def noted(*args: Any, **kwargs: Any) -> Any:
            travelled.append(max(given.numel() for given in (*args, *kwargs.values()) if isinstance(given, Tensor)))
            return reduce(*args, **kwargs)

        return noted

    try:
        for name, reduce in collectives.items():
            setattr(dist, name, noting(reduce))
        yield
    finally:
        for name, reduce in collectives.items():
            setattr(dist, name, reduce)


def check(family: str, name: str, wrap: Wrap) -> None:
    """Compare an engine with one process; prints what held."""
    model, travelled = patched(family), []
    expected = train(alone := copy.deepcopy(model), alone, batches())
    size = sum(parameter.numel() for parameter in model.prefix.parameters())
    linears_inside = sum(isinstance(module, linears.FrozenLinear) for module in model.modules())
    engine = wrap(model, travelled)
    with counted(travelled):
        found = train(engine, model, [own_rows(batch) for batch in batches()])
    for ours, theirs in zip(found, expected, strict=True):
        if ours.dim() == 0:
            ours = ours.clone()
            dist.all_reduce(ours)
            ours = ours / dist.get_world_size()
        assert_close(ours, theirs, 1e-5)
    assert linears_inside > 0
    assert travelled == [size] * STEPS, f"expected {size} elements a step, got {travelled}"
    if dist.get_rank() == 0:
        print(f"{family} {name}: losses and gradients of one process")
        print(f"{family} {name}: only the prefix travelled")


def main() -> None:
    """Every family under every engine."""
    linears.LEAST_WEIGHT = 0
    dist.init_process_group("gloo")
    for family in ("gpt2", "llama"):
        for name, wrap in {"ddp": ddp, "fsdp2": fsdp2}.items():
            check(family, name, wrap)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
