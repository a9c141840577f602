"""Shared memory: every tile has room for every option of a call on every architecture; if not, a safe one runs."""

import importlib.util
import itertools
import os
from dataclasses import replace

import pytest
import torch

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)
if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
    pytest.skip("TRITON_INTERPRET is set: the kernels are not compiled", allow_module_level=True)

from launches import TARGETS, Launch, Shape, launches_of_trial, problem_of
from registry import HEADS
from test_triton_static import same_release

from prefix_fast.backends import triton_call
from prefix_fast.backends.problem import Problem
from prefix_fast.backends.triton_config import PRECISIONS, Tile, safe_tiles
from prefix_fast.backends.triton_neighbours import SHARED_MEMORY

OPTIONS = {  # those of a call; "bias" is float32
    "dropout": ("dropout",),
    "mask": ("mask",),
    "mask bias": ("mask", "bias"),
    "all with half bias": ("mask", "window", "softcap", "dropout", "half bias"),
    "all": ("mask", "window", "softcap", "dropout", "bias"),
}
KINDS: dict[str, tuple[torch.dtype, torch.dtype | None, str]] = {
    "bf16": (torch.bfloat16, None, "highest"),
    "fp16": (torch.float16, None, "highest"),
    "bf16+fp32 prefix": (torch.bfloat16, torch.float32, "highest"),
    **{f"fp32-{name}": (torch.float32, None, precision) for precision, name in PRECISIONS.items()},
}


def empty(*sizes: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(sizes, dtype=dtype, device="meta")


def problem_with(options: tuple[str, ...], shape: Shape) -> Problem:
    """A call of meta tensors with some options; biases of the shared and of the own keys."""
    tokens, problem = shape.T, problem_of(shape)
    values = {
        "mask": {"key_mask": empty(shape.B, tokens, dtype=torch.bool)},
        "window": {"window": tokens // 2},
        "softcap": {"softcap": 30.0},
        "dropout": {"dropout_p": 0.1, "dropout_seed": empty(1, dtype=torch.int64)},
    }
    for name in options:
        if name in values:
            problem = replace(problem, **values[name])
        else:
            dtype = torch.float32 if name == "bias" else shape.dtype
            own, shared = (empty(shape.B, shape.H, tokens, keys, dtype=dtype) for keys in (tokens, shape.P))
            sets = tuple(replace(s, bias=shared) for s in problem.sets)
            problem = replace(problem, attn_bias=own, sets=sets)
    if "window" in options:
        problem = replace(problem, sets=tuple(replace(s, in_window=True) for s in problem.sets))
    return problem


def launches_with(
    options: str, architecture: str, kernel: str, D: int, kind: str = "bf16", tile: Tile | None = None
) -> list[Launch]:
    sizes = {"short": {"B": 32, "P": 32}, "split": {"B": 64, "T": 16}}.get(kernel, {})
    dtype, prefix_dtype, precision = KINDS[kind]
    torch.set_float32_matmul_precision(precision)
    shape = Shape(*HEADS[D], D, dtype=dtype, prefix_dtype=prefix_dtype, **sizes)
    return launches_of_trial(problem_with(OPTIONS[options], shape), architecture, kernel, tile)


def too_large(launches: list[Launch], architecture: str) -> list[tuple[str, tuple[int, ...], int]]:
    """The launches that the architecture has no room for."""
    sizes = [(launch.kernel, tuple(launch.tile), launch.shared) for launch in launches]
    return [size for size in sizes if size[-1] > SHARED_MEMORY[architecture]]


@same_release
@pytest.mark.parametrize(
    ("architecture", "kernel", "D", "options"),
    [
        ("sm_86", "forward", 64, "mask bias"),
        ("sm_80", "forward", 128, "all"),
        ("sm_120", "dkv", 64, "mask bias"),
        ("sm_120", "dq", 128, "dropout"),
        ("sm_89", "dq", 128, "mask bias"),
    ],
)
def test_sampled_tiles_have_room_for_options(architecture: str, kernel: str, D: int, options: str) -> None:
    launches = launches_with(options, architecture, kernel, D)
    assert launches and too_large(launches, architecture) == []


@same_release
def test_the_tile_of_the_table_needs_its_stages_lowered_for_a_wide_bias(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_call, "with_room", lambda device, tiles, *_: tiles)
    assert too_large(launches_with("mask bias", "sm_86", "dq", 128), "sm_86")


EVERYTHING = [
    (architecture, D, kind)
    for architecture, D, kind in itertools.product(TARGETS, HEADS, KINDS)
    if (D in (64, 128, 256) or kind == "bf16")
    and (D == 64 or kind != "fp16")
    and not (kind.startswith("fp32-tf32") and (D == 256 or architecture.startswith("gfx")))
]


@same_release
@pytest.mark.slow
@pytest.mark.parametrize(("architecture", "D", "kind"), EVERYTHING)
def test_every_tile_has_room_for_every_option(architecture: str, D: int, kind: str) -> None:
    options = tuple(OPTIONS) if kind == "bf16" else ("mask", "all")
    found = {}
    for kernel, chosen in itertools.product(("forward", "dq", "dkv", "few", "split", "short"), options):
        if kernel in ("few", "split", "short") and chosen not in ("mask bias", "all"):
            continue
        launches = launches_with(chosen, architecture, kernel, D, kind)
        assert launches or kernel == "short"  # where the cost model has no use for it
        if over := too_large(launches, architecture):
            found[kernel, chosen] = over
    assert found == {}


@same_release
@pytest.mark.slow
@pytest.mark.parametrize(
    ("architecture", "D", "kind"),
    list(itertools.product(("sm_86", "gfx942"), (64, 128, 256), ("bf16", "bf16+fp32 prefix", "fp32-ieee"))),
)
def test_every_safe_tile_has_room_for_every_option(architecture: str, D: int, kind: str) -> None:
    for kernel, options in itertools.product(("forward", "dq", "dkv", "split"), ("mask", "all")):
        launches = launches_with(options, architecture, kernel, D, kind, getattr(safe_tiles(D), kernel))
        assert launches and too_large(launches, architecture) == []
