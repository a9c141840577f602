"""Wrong CUDA kernels, each by one small change of the sources, and which check sees it.

Run as a program; arguments: numbers of mutants, none for all. A mutant is a copy of csrc/cuda of which one file
differs; random calls run on it until a check fails, and that must be the check that the mutant names. "oracle" is the
comparison with the float64 truth; the others are the emulator's.
"""

import itertools
import shutil
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from cuda_cases import DTYPES, check, check_conflicts, load
from cuda_compile import KERNELS, kernels_module
from cuda_harness import CaughtError
from random_calls import KINDS, Call, random_call

SEEDS, TRIES = range(600), 12
MOST_ACCESSES = 3_000_000  # of a call in half precision; random ones have 1_200_000 at most


class Mutant(NamedTuple):
    """The first `old` in the file, after the first `after`, becomes `new`; one of `checks` sees it."""

    file: str
    old: str
    new: str
    checks: str | tuple[str, ...]
    after: str = ""
    kernels: tuple[str, ...] = ("forward", "backward_dq")  # sources that are compiled with the change
    kinds: tuple[str, ...] = ()  # of random_calls.KINDS and below
    type: str = "fp16"
    head_dim: int = 0  # of the calls; 0: any up to 64


_DECODE, _DKV, _SHORT = ("decode",), ("backward_dkv",), ("short_prefix",)
_ALL = (
    "forward",
    "decode",
    "backward_dq",
    "backward_dkv",
    "short_prefix",
)  # where functions of two objects must not differ


def takes_short(call: Call) -> bool:
    """Whether one kernel makes the gradients of queries and prefix, and a block of it has several tiles."""
    case = call.case
    plain = not (case.packed or case.packed_segments or case.attn_bias or case.dropout_p or call.unwanted)
    few_keys = case.num_sets == 1 and 0 < case.P <= 64
    return plain and few_keys and not {"softcap", "segment_bias"} & set(case.options) and case.B * case.H >= 4


_KINDS = KINDS | {
    "few": lambda call: call.case.Tq <= 8 and not call.case.packed,
    "many": lambda call: call.case.Tq >= 31,
    "shared": lambda call: call.case.num_sets > 0 and call.case.P >= 31 and call.case.ids == "none",
    "long": lambda call: call.case.P >= 64 and call.case.num_sets > 0,
    "own": lambda call: call.case.Tk >= 31,
    "short": lambda call: takes_short(call),
}

MUTANTS = [
    # Barriers, waits and the stages of the pipeline.
    Mutant("walk.cuh", "    __syncthreads();\n#pragma unroll", "#pragma unroll", "race", kinds=("sets", "many")),
    Mutant("walk.cuh", "__syncthreads();\n        const int next", "const int next", "race", kinds=("many",)),
    Mutant("walk.cuh", "__syncthreads();\n        const int next",
           "if (warp() == 0) __syncthreads();\n        const int next",
           ("barrier divergence", "race"), kinds=("many",)),
    Mutant("walk.cuh", "cp_async_wait<kStages - 2>();", "cp_async_wait<kStages - 1>();", "missing wait",
           kinds=("many",)),
    Mutant("walk.cuh", "before(stage), is_simple);", "stage, is_simple);",
           "missing wait", kinds=("long", "many")),
    Mutant("walk.cuh", "dynamic_shared + stage);", "dynamic_shared + stage / 2);",
           ("race", "missing wait"), kinds=("long", "many")),
    Mutant("walk.cuh", "maximum(high - full_high, 0), kKeys);", "maximum(high - full_high, 0), kKeys) + (1 << 24);",
           "runaway", kinds=("many",)),
    Mutant("walk.cuh", "    __syncthreads();\n#pragma unroll", "#pragma unroll", "race", kernels=_DKV,
           kinds=("many", "group")),
    Mutant("walk.cuh", "__syncthreads();\n        const int next", "const int next", "race", kernels=_DKV,
           kinds=("many",)),
    Mutant("walk.cuh", "cp_async_wait<kStages - 2>();", "cp_async_wait<kStages - 1>();", "missing wait",
           kernels=_DKV, kinds=("many",)),
    Mutant("key_major.cuh", "query / 2 * 2 * kPitch<T, D> + D", "query / 2 * kPitch<T, D> + D",
           ("race", "missing wait", "oracle", "uninitialised read"), kernels=_DKV, kinds=("many",)),
    Mutant("key_major.cuh", "            cp_async_wait<0>();", "", ("missing wait", "in flight at exit"), kernels=_DKV,
           type="fp32"),
    Mutant("walk.cuh", "        copies.arrived(stage);\n        __syncthreads();",
           "        __syncthreads();\n        copies.arrived(stage);",
           "race", type="tf32", kinds=("many",)),
    # What one block writes and another reads.
    Mutant("decode.cu", "    __threadfence();  // the block's part", "    // the block's part", "race", kernels=_DECODE,
           kinds=("few", "shared")),
    Mutant("decode.cu", "    __threadfence();  // and the other parts", "    // and the other parts", "race",
           kernels=_DECODE, kinds=("few", "shared")),
    Mutant("decode.cu", "__syncthreads();\n    __threadfence();  // the block's", "__threadfence();  // the block's",
           "race",
           kernels=_DECODE, kinds=("few", "shared")),
    Mutant("decode.cu", "    __syncthreads();\n    for (int i = 0; i < rows; ++i)",
           "    for (int i = 0; i < rows; ++i)",
           ("race", "uninitialised read", "out of bounds"), kernels=_DECODE, kinds=("few",)),
    Mutant("decode.cu", "    __syncthreads();  // the tiles of keys have been read", "", "race", kernels=_DECODE,
           kinds=("few", "shared")),
    Mutant("decode.cu", "    __syncthreads();\n    const float to_base_2", "    const float to_base_2",
           ("race", "uninitialised read"), kernels=_DECODE, kinds=("few",)),
    Mutant("decode.cu", "atomicAdd(counter, done) + done ==", "(*counter += done) ==", "race", kernels=_DECODE,
           kinds=("few", "shared")),
    Mutant("decode.cu", "if (last) *counter = 0;", "", "counters", kernels=_DECODE, kinds=("few",)),
    Mutant("decode.cu", "tile.part * slots_of(call) +", "0 * slots_of(call) +", "race", kernels=_DECODE,
           kinds=("few", "shared")),
    Mutant("decode.cu", "if (level == -infinity()) continue;", "", "uninitialised read", kernels=_DECODE,
           kinds=("few", "lengths", "ids")),
    Mutant("decode.cu", "if (finished[i] < 0) continue;", "", ("out of bounds", "race"), kernels=_DECODE,
           kinds=("few", "shared")),
    # The fused backward of a short prefix.
    Mutant("short_prefix.cu", "        __syncthreads();  // the last tile has been read\n", "", "race", kernels=_SHORT,
           kinds=("short",)),
    Mutant("short_prefix.cu", "    cp_async_wait<0>();\n    __syncthreads();\n}", "    __syncthreads();\n}",
           "missing wait", kernels=_SHORT, kinds=("short",)),
    Mutant("short_prefix.cu", "    __syncthreads();\n    multiply_stored", "    multiply_stored",
           ("race", "uninitialised read"), kernels=_SHORT, kinds=("short",)),
    Mutant("short_prefix.cu", "int item = split;", "int item = 0;", ("oracle", "race"), kernels=_SHORT,
           kinds=("short",)),
    Mutant("short_prefix.cu", "= *QueryColumns<T, D>::delta_of(", "= *QueryColumns<T, D>::level_of(", "oracle",
           kernels=_SHORT, kinds=("short",)),
    Mutant("short_prefix.cu", "call.head_dim, call.scale, columns);", "call.head_dim, 1, columns);", "oracle",
           kernels=_SHORT, kinds=("short",)),
    # Bounds, alignment and what is a launch's own.
    Mutant("tiles.cuh", "if (from != nullptr && column < head_dim)\n", "if (from != nullptr)\n", "out of bounds",
           kinds=("padded head dim",), head_dim=24),
    Mutant("loads.cuh", "first + row < count", "first + row <= count", ("out of bounds", "oracle"),
           kinds=("own",)),
    Mutant("loads.cuh", "cp_async_16(to, from, valid);", "cp_async_16(to, from, true);", "out of bounds",
           kinds=("many",)),
    Mutant("loads.cuh", "column() < head_dim ? rows : 0;", "rows;", ("out of bounds", "oracle"),
           kinds=("padded head dim", "many"), head_dim=24),
    Mutant("loads.cuh", "&& !mask.hides(first + row)", "", "oracle", kinds=("mask", "many")),
    Mutant("elements.cuh", "kPitch = D + kChunk<T>;", "kPitch = D + kChunk<T> / 2;", "misaligned", kernels=_ALL),
    Mutant("elements.cuh", "kPitch = D + kChunk<T>;", "kPitch = D + 2 * kChunk<T>;", "bank conflicts", kernels=_ALL,
           kinds=("many",)),
    Mutant("walk.cuh", "kSharedBytes = kPipelineBytes + kQueryBytes;",
           "kSharedBytes = kPipelineBytes / 2 + kQueryBytes;",
           "out of bounds", kinds=("many",)),
    Mutant("decode.cu", "? Many::kSharedBytes : kFolds;", "? kFolds / 2 : kFolds;", "out of bounds", kernels=_DECODE,
           kinds=("few",)),
    Mutant("sums.cuh", "use(8 * n + lane_column(), float2", "use(8 * n + lane_column() + 1, float2",
           ("misaligned", "out of bounds"), kernels=_DECODE, kinds=("few", "wide group")),
    Mutant("forward.cu", "static_cast<char*>(results.out.data) +", "static_cast<char*>(call.query.data) +",
           ("read-only write", "out of bounds"), kernels=("forward",), kinds=("many",)),
    Mutant("forward.cu", "block(Shape::kThreads);", "block(16 * Shape::kThreads);", "launch limit",
           kernels=("forward",),
           kinds=("many",)),
    Mutant("forward.cu", "Shape::kSharedBytes,", "16 * Shape::kSharedBytes,", "shared memory limit",
           kernels=("forward",),
           kinds=("many",)),
    Mutant("forward.cu", "if (tile.first + place >= tile.count) continue;",
           "if (tile.first + place > tile.count) continue;", ("race", "out of bounds"), kernels=("forward",),
           kinds=("many",)),
    Mutant("key_major.cuh", "if (key >= block.size) return;", "if (key > block.size) return;",
           ("race", "out of bounds"), kernels=_DKV),
    Mutant("backward_dkv.cu", "if (index >= count) return;", "", "out of bounds", kernels=_DKV),
    # Warps.
    Mutant("softmax.cuh", "value += __shfl_xor_sync(0xFFFFFFFFu, value, 1);",
           "value += __shfl_xor_sync(0x55555555u, value, 1);", "warp divergence"),
    Mutant("forward.cu", "= sum_of_row(state.total[m][half]);",
           "= lane_row() < 7 ? sum_of_row(state.total[m][half]) : 0;", "warp divergence", kernels=("forward",),
           kinds=("many",)),
    Mutant("softmax.cuh", "return value + __shfl_xor_sync(0xFFFFFFFFu, value, 2);",
           "return value + __shfl_xor_sync(0xFFFFFFFFu, value, 4);", "oracle"),
    Mutant("backward_dq.cu", "step < kLanesOfRow;", "2 * step < kLanesOfRow;", "oracle", kernels=("backward_dq",)),
    # Fragments.
    Mutant("tiles.cuh", "a[m], {b[0], b[1]});", "a[m], {b[1], b[0]});", "oracle"),
    Mutant("sums.cuh", "ldmatrix_x4_trans(b,", "ldmatrix_x4(b,", "oracle"),
    Mutant("tiles.cuh", "(lane() % 8 + lane() / 16 * 8) * kStride + lane() / 8 % 2 * kChunk<T>",
           "(lane() % 8 + lane() / 8 % 2 * 8) * kStride + lane() / 16 * kChunk<T>", "oracle"),
    Mutant("sums.cuh", "packed<T>(w[i % 2 * 2], w[i % 2 * 2 + 1])", "packed<T>(w[i % 2 * 2 + 1], w[i % 2 * 2])",
           "oracle"),
    Mutant("tiles.cuh", "const char* from = row[m][i % 2];", "const char* from = row[m][i / 2];", "oracle"),
    Mutant("sums.cuh", "weights[m][k][i % 2 * 2 + i / 2]", "weights[m][k][i]", "oracle", type="tf32"),
    Mutant("sums.cuh", "weights[m][k][j % 2], j / 2, 4)", "weights[m][k][j / 4], j % 4, 4)", "oracle", type="fp32"),
    Mutant("sums.cuh", "{sums[n][i], sums[n + 1][i],", "{sums[n + 1][i], sums[n][i],", "oracle", type="fp32"),
    Mutant("sums.cuh", "{even.x, even.y, odd.x, odd.y}", "{even.x, odd.x, even.y, odd.y}", "oracle", type="tf32"),
    Mutant("sums.cuh", "b[m][i / 2][i % 2] =", "b[m][i % 2][i / 2] =", "oracle", type="tf32"),
    Mutant("sums.cuh", "use(16 * m + 8 * half + lane_column() + c,", "use(16 * m + 8 * half + lane_row(),",
           ("race", "oracle"), type="tf32"),
    # Masks and numbers.
    Mutant("softmax.cuh", "key <= last && key >= first;", "key < last && key >= first;", "oracle", kinds=("causal",
           "own")),
    Mutant("softmax.cuh", "if (key < tile.valid && !tile.mask", "if (!tile.mask",
           ("oracle", "out of bounds"), kinds=("not causal",)),
    Mutant("softmax.cuh", "if (key < tile.valid && !tile.mask.hides(key))", "if (key < tile.valid)", "oracle",
           kinds=("mask", "many")),
    Mutant("softmax.cuh", "* factor + total;", "+ total;", "oracle", kinds=("many", "long")),
    Mutant("softmax.cuh", "now == -infinity() ? 0 : now;", "now;", "oracle"),
    Mutant("attend.cuh", "keys + Shape::kTileElements);", "keys);", "oracle", kernels=("forward",), kinds=("many",)),
    Mutant("key_major.cuh", "(value - (i % 2 == 0 ? deltas.x", "(value - (i < 2 ? deltas.x",
           "oracle",
           kernels=_DKV, kinds=("many",)),
    Mutant("backward_dkv.cu", "row = set.order[row];", "row = row;", "oracle", kernels=_DKV, kinds=("ids", "many")),
    Mutant("key_major.cuh", "query < first ||", "", "oracle", kernels=_DKV, kinds=("causal", "own", "many")),
]  # fmt: skip


def sources_of(mutant: Mutant, folder: Path) -> Path:
    """A copy of csrc/cuda in the folder, with the change."""
    changed = folder / "cuda"
    shutil.copytree(KERNELS, changed)
    text = (KERNELS / mutant.file).read_text("utf-8")
    begin = text.find(mutant.old, max(text.find(mutant.after), 0))
    if begin < 0 or mutant.after not in text:
        raise LookupError(f"{mutant.file} has no {mutant.old!r}: the mutant must follow the source")
    (changed / mutant.file).write_text(text[:begin] + mutant.new + text[begin + len(mutant.old) :], "utf-8")
    return changed


def calls_of(mutant: Mutant) -> list[Call]:
    """The random calls that try it."""
    calls = (random_call(seed, DTYPES[mutant.type]) for seed in SEEDS)
    fitting = (
        replace(call, case=replace(call.case, D=mutant.head_dim or call.case.D), scores="normal")
        for call in calls
        if (mutant.head_dim or call.case.D in (16, 24, 32, 64)) and all(_KINDS[kind](call) for kind in mutant.kinds)
    )
    return list(itertools.islice(fitting, TRIES))


def killer(mutant: Mutant) -> tuple[str, str]:
    """The first check that fails, and what it says; empty: none."""
    with tempfile.TemporaryDirectory() as folder:
        library = load(kernels_module(mutant.type, (64,), sources_of(mutant, Path(folder)), mutant.kernels))
    limit = {"most_accesses": MOST_ACCESSES} if mutant.type == "fp16" else {}
    for call in calls_of(mutant):
        try:
            check(call, library, mutant.type, **limit)
            check_conflicts(call, library, mutant.type)
        except CaughtError as error:
            return error.check, str(error)
        except AssertionError as error:
            return "counters" if str(error).startswith("counters") else "oracle", str(error)
    return "", ""


def named(mutant: Mutant) -> tuple[str, ...]:
    """The checks that may see it."""
    return (mutant.checks,) if isinstance(mutant.checks, str) else mutant.checks


def main(arguments: list[str]) -> int:
    """Run mutants; print how each was seen. Returns the number of those that the named check did not see."""
    torch.set_num_threads(1)
    survivors = 0
    for number in map(int, arguments) if arguments else range(len(MUTANTS)):
        mutant = MUTANTS[number]
        name, text = killer(mutant)
        seen = name in named(mutant)
        survivors += not seen
        verdict = "" if seen else "SURVIVES: " if not name else f"EXPECTED {mutant.checks}: "
        print(f"{number} {mutant.file}: {mutant.old!r} -> {mutant.new!r}: {verdict}{name}: {text[:200]}", flush=True)
    print(f"{survivors} survivors")
    return survivors


if __name__ == "__main__":
    sys.exit(min(main(sys.argv[1:]), 1))
