"""Half-precision compute of a model that is loaded in float32: what the machine has, and copies of frozen weights.

Autocast casts a weight again in every forward, and holds the copy until the backward pass has read it. Of a frozen
weight one copy is made, at its first use, and kept beside the original: half of its bytes. The original stays what is
saved, differentiated against and given back. A copy is made anew when its weight was written to, moved or replaced;
writes through `.data` are not seen.
"""

from __future__ import annotations

import functools
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

DTYPES = (torch.bfloat16, torch.float16)
MARK = "_prefix_fast_compute"  # in the __dict__ of a linear layer: the dtype in which it computes under autocast
# What processors call their instructions for products; the second line of each is ARM's.
_INSTRUCTIONS = {
    torch.bfloat16: (("avx512_bf16", "amx_bf16"), ("bf16", "arm_bf16")),
    torch.float16: (("avx512_fp16", "amx_fp16"), ("fphp", "asimdhp", "arm_fp16_arith")),
}


def lacking(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why products in a half-precision dtype would be slower than in float32 on a device, or None.

    Devices other than CPUs and GPUs are taken as they are.
    """
    if device.type == "cuda":
        return _lacking_gpu(device.index if device.index is not None else torch.cuda.current_device(), dtype)
    return _lacking_cpu(dtype) if device.type == "cpu" else None


def check(name: str, device: torch.device, dtype: torch.dtype) -> None:
    """Raise NotImplementedError where the device lacks the dtype."""
    reason = lacking(device, dtype)
    if reason is not None:
        raise NotImplementedError(
            f"{name}: expected a compute_dtype that the machine has instructions for, got {_name(dtype)}: {reason};"
            " leave it out to compute in the model's own dtype"
        )


@functools.cache
def _lacking_cpu(dtype: torch.dtype) -> str | None:
    known = instructions()
    wanted = _INSTRUCTIONS[dtype]
    if any(name in known for names in wanted for name in names):
        return None
    return f"this CPU has no instructions for {_name(dtype)} products ({' or '.join(wanted[0])})"


@functools.cache
def _lacking_gpu(index: int, dtype: torch.dtype) -> str | None:
    if dtype != torch.bfloat16 or torch.version.hip is not None or torch.cuda.get_device_capability(index) >= (8, 0):
        return None
    return f"{torch.cuda.get_device_name(index)} has no instructions for bfloat16 products (compute capability 8.0)"


def instructions() -> frozenset[str]:
    """What this CPU says that it can do."""
    found: set[str] = set()
    if hasattr(torch.cpu, "get_capabilities"):
        found = {name for name, has in torch.cpu.get_capabilities().items() if has is True}
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            name, _, value = line.partition(":")
            if name.strip() in ("flags", "Features"):
                return frozenset(found | set(value.split()))
    return frozenset(found)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


_copies = WeakIdKeyDictionary()  # weight → what it was, and its copy


def copy_of(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """The weight in that dtype: itself, or the copy that is kept beside it."""
    if weight.dtype == dtype:
        return weight
    if weight.is_inference():  # whose changes are not counted
        return weight.detach().to(dtype)
    state = (weight._version, weight.data_ptr(), weight.device, tuple(weight.shape), dtype)
    kept = _copies.get(weight)
    if kept is None or kept[0] != state:
        with torch.inference_mode(False), torch.no_grad():
            kept = _copies[weight] = (state, weight.detach().to(dtype))
    return kept[1]


def dtype_of(layer: torch.nn.Module) -> torch.dtype | None:
    """The dtype in which a linear layer multiplies by copies of its weight and bias; None: by themselves.

    Only what is marked, under autocast in the marked dtype, and plain frozen parameters.
    """
    dtype = layer.__dict__.get(MARK)
    if dtype is None or torch._C._len_torch_dispatch_stack() > 0:
        return None
    parameters = [p for p in (layer.weight, layer.bias) if isinstance(p, Tensor)]
    device = str(parameters[0].device.type)
    if not torch.is_autocast_enabled(device) or torch.get_autocast_dtype(device) != dtype:
        return None
    plain = all(type(parameter) is torch.nn.Parameter and not parameter.requires_grad for parameter in parameters)
    return dtype if plain else None


def operands_of(layer: torch.nn.Module) -> tuple[torch.dtype | None, Tensor, Tensor | None]:
    """`dtype_of` a linear layer, and the weight and bias that it multiplies by."""
    dtype, weight, bias = dtype_of(layer), layer.weight, layer.bias
    if dtype is not None:
        weight, bias = copy_of(weight, dtype), None if bias is None else copy_of(bias, dtype)  # type: ignore[arg-type]
    return dtype, weight, bias  # type: ignore[return-value]


def forget(*weights: Tensor | None) -> None:
    """Give the memory of their copies back."""
    for weight in weights:
        if weight is not None:
            _copies.pop(weight, None)
