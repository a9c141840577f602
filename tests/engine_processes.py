"""Run by torch.distributed.run on two processes: a patched model under each engine named against one process alone."""

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
from prefix_fast.models.outputs import Deferred

STEPS, ROWS, TOKENS = 3, 4, 9
REDUCTIONS = ("reduce_scatter_single", "reduce_scatter_tensor")
Gradient = Callable[[nn.Parameter], Tensor]
Train = Callable[[nn.Module, list[dict[str, Tensor]], list[int]], list[Tensor]]


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


def prefix_of(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that are trained."""
    return [parameter for name, parameter in model.named_parameters() if name.startswith("prefix.")]


def whole(parameter: nn.Parameter) -> Tensor:
    """The gradient of all shards of a parameter."""
    gradient = parameter.grad
    return gradient.full_tensor() if isinstance(gradient, DTensor) else gradient.clone()


def train(
    engine: nn.Module, model: nn.Module, data: list[dict[str, Tensor]], *,
    optimizer: Any = None, backward: Callable[[Tensor], None] = Tensor.backward, gradient: Gradient = whole,
) -> list[Tensor]:  # fmt: skip
    """The loss and the gradients of the prefix in each step."""
    prefix = prefix_of(model)
    optimizer = optimizer or torch.optim.SGD(prefix, lr=0.1)
    frozen = [parameter for name, parameter in model.named_parameters() if not name.startswith("prefix.")]
    results = []
    for batch in data:
        output = engine(**batch)
        loss = output.loss
        backward(loss)
        assert isinstance(vars(output)["logits"], Deferred)  # no engine has read them
        assert all(parameter.grad is None for parameter in frozen)
        results += [loss.detach(), *(gradient(parameter) for parameter in prefix)]
        optimizer.step()
        optimizer.zero_grad()
    return results


def ddp(model: nn.Module, data: list[dict[str, Tensor]], travelled: list[int]) -> list[Tensor]:
    """Train under DistributedDataParallel, whose buckets are counted."""

    def hook(group: Any, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        travelled.append(bucket.buffer().numel())
        return allreduce_hook(group, bucket)

    engine = DistributedDataParallel(model)
    engine.register_comm_hook(None, hook)
    return train(engine, model, data)


def fsdp2(model: nn.Module, data: list[dict[str, Tensor]], travelled: list[int]) -> list[Tensor]:
    """Train with every block and the rest sharded."""
    blocks = model.transformer.h if hasattr(model, "transformer") else model.model.layers
    for block in blocks:
        fully_shard(block)
    return train(fully_shard(model), model, data)


def zero3(model: nn.Module, data: list[dict[str, Tensor]], travelled: list[int]) -> list[Tensor]:
    """Train under DeepSpeed with every parameter, gradient and state of the optimizer sharded."""
    import deepspeed
    from deepspeed.comm import comm
    from deepspeed.utils import safe_get_full_grad

    prefix = prefix_of(model)
    config = {
        "train_micro_batch_size_per_gpu": ROWS // dist.get_world_size(),
        "zero_optimization": {"stage": 3},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    engine, *_ = deepspeed.initialize(
        model=model, model_parameters=prefix, optimizer=torch.optim.SGD(prefix, lr=0.1), config=config
    )
    backend, reduce = comm.cdb, comm.cdb.reduce_scatter_function
    backend.reduce_scatter_function = noting(reduce, travelled)
    try:
        return train(engine, model, data, optimizer=engine, backward=engine.backward, gradient=safe_get_full_grad)
    finally:
        backend.reduce_scatter_function = reduce


def noting(reduce: Callable, travelled: list[int]) -> Callable:
    """The collective, with the number of its elements counted."""

    def noted(*args: Any, **kwargs: Any) -> Any:
        travelled.append(max(given.numel() for given in (*args, *kwargs.values()) if isinstance(given, Tensor)))
        return reduce(*args, **kwargs)

    return noted


@contextmanager
def counted(travelled: list[int]) -> Iterator[None]:
    """Count what FSDP2 reduces; its name for the collective differs by release."""
    collectives = {name: getattr(dist, name) for name in REDUCTIONS if hasattr(dist, name)}
    try:
        for name, reduce in collectives.items():
            setattr(dist, name, noting(reduce, travelled))
        yield
    finally:
        for name, reduce in collectives.items():
            setattr(dist, name, reduce)


def check(family: str, name: str, train_with: Train) -> None:
    """Compare an engine with one process; prints what held."""
    model, travelled = patched(family), []
    expected = train(alone := copy.deepcopy(model), alone, batches())
    size = sum(parameter.numel() for parameter in model.prefix.parameters())
    linears_inside = sum(isinstance(module, linears.FrozenLinear) for module in model.modules())
    with counted(travelled):
        found = train_with(model, [own_rows(batch) for batch in batches()], travelled)
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
    """Every family under every engine that the command names."""
    linears.LEAST_WEIGHT = 0
    dist.init_process_group("gloo")
    if "zero3" in sys.argv:  # it keeps the collectives that it finds when it begins
        import deepspeed

        deepspeed.init_distributed("gloo")
    engines = {"ddp": ddp, "fsdp2": fsdp2, "zero3": zero3}
    for family in ("gpt2", "llama"):
        for name in sys.argv[1:]:
            check(family, name, engines[name])
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
