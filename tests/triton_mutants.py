"""Wrong kernels, each by one small change of the sources, and whether the checks of the other files see it.

Run as a program with TRITON_INTERPRET=1; arguments: numbers of mutants, none for all. A mutant is a package of links to
the sources, of which one file differs; a process of its own imports it and runs random calls, or calls in far memory,
until a check fails. One that passes them all is a hole in the tests.
"""

import contextlib
import io
import itertools
import os
import sys
import tempfile
import warnings
from pathlib import Path
from typing import NamedTuple

import torch
import triton  # noqa: F401  # before the fork, for all mutants
import triton_harness  # noqa: F401

ROOT = Path(__file__).resolve().parent.parent
SEEDS = range(200)
TRIES = 16


class Mutant(NamedTuple):
    """The first `old` in the file, after the first `after`, becomes `new`. Random calls try it, those of one kind."""

    file: str
    old: str
    new: str
    after: str = ""
    kinds: tuple[str, ...] = ()  # of triton_cases.KINDS
    first: str = ""  # calls before the random ones: "corners", or "short", those of a short prefix
    far: tuple[str, ...] = ()  # calls in far memory that try it instead


_ROWS, _PRIMITIVES, _KEYS = "kernels/row_major.py", "kernels/primitives.py", "kernels/key_major.py"
_FORWARD, _DQ = "kernels/prefix_attention_fwd.py", "kernels/prefix_attention_bwd_dq.py"
_ATTEND, _SPLIT, _MERGE = "kernels/attend.py", "kernels/prefix_attention_split_fwd.py", "kernels/merge_states.py"
_SHORT, _PLAN = "kernels/prefix_attention_bwd_short.py", "prefix_fast/backends/problem.py"
_DKV, _CALL = "kernels/prefix_attention_bwd_dkv.py", "prefix_fast/backends/triton_call.py"

MUTANTS = [
    # What a query sees.
    Mutant(_ROWS, "keys[None, :] <= positions[:, None]", "keys[None, :] < positions[:, None]", kinds=("causal",)),
    Mutant(_ROWS, "+ begin > positions[:, None] - window", "+ begin >= positions[:, None] - window", kinds=("window",)),
    Mutant(_ROWS, "tl.maximum(last_position + 1, 0)", "tl.maximum(last_position, 0)", kinds=("causal",)),
    Mutant(_ROWS, "tl.maximum(first_position + 1, 0)", "tl.maximum(last_position + 1, 0)", kinds=("causal",)),
    Mutant(_ROWS, "tl.maximum(first_position - window + 1 - begin, 0)",
           "tl.maximum(last_position - window - begin, 0)", kinds=("window",)),
    Mutant(_ROWS, "length += valid", "length += size", kinds=("in window",)),
    Mutant(_ROWS, "present = start + tile < valid", "present = start + tile <= valid"),
    Mutant(_PRIMITIVES, "offset = row * 0 + fixed_offset", "offset = row * 0"),
    Mutant(_PRIMITIVES, "query_offset + row.to(tl.int64) * stride",
           "query_offset + row.to(tl.int64) * 0", kinds=("offset",)),
    Mutant(_PRIMITIVES, "chosen = (unit >= 0) & (unit < count)", "chosen = unit < count", kinds=("ids",)),
    Mutant(_PRIMITIVES, "tl.minimum(tl.maximum(given, 0), valid.to(tl.int64))", "valid", kinds=("lengths",)),
    Mutant(_KEYS, "keys[:, None] <= queries[None, :] + offset",
           "keys[:, None] < queries[None, :] + offset", kinds=("causal",)),
    Mutant(_KEYS, "> queries[None, :] + offset - window", ">= queries[None, :] + offset - window", kinds=("window",)),
    Mutant(_KEYS, "tl.where(present[:, None], total, 0.0)", "total", kinds=("hidden",)),
    Mutant(_DKV, "tl.maximum(begin + last_key + window - offset, 0)",
           "tl.maximum(begin + first_key + window - offset, 0)", kinds=("window",)),
    Mutant(_DKV, "tl.maximum(first_key - offset, 0)", "tl.maximum(last_key - offset, 0)", kinds=("causal",)),
    Mutant(_DKV, "tl.cdiv(tl.maximum(last_key - offset, 0), BLOCK_Q)",
           "tl.maximum(last_key - offset, 0) // BLOCK_Q", kinds=("causal",)),
    Mutant(_FORWARD, "part != 1 or mask is not None", "part != 1", kinds=("mask",)),
    # The numbers.
    Mutant(_PRIMITIVES, "total * factor + tl.sum(weights, 1)", "total + tl.sum(weights, 1)"),
    Mutant(_PRIMITIVES, "tl.where(new_maximum == -INFINITY, 0.0, new_maximum)", "new_maximum"),
    Mutant(_PRIMITIVES, "slope = 1 - bounded * bounded", "slope = 1 - bounded", kinds=("softcap",)),
    Mutant(_PRIMITIVES, "total = tl.where(empty, 0.0, total * factor",
           "total = tl.where(empty, 0.0, total", kinds=("sinks",)),
    Mutant(_DQ, "delta -= tl.load", "delta += tl.load"),
    Mutant(_DQ, "tl.where(empty, INFINITY, ", "tl.where(empty, level, "),
    Mutant(_DQ, "mask=valid, other=-INFINITY", "mask=valid, other=0.0"),
    Mutant(_DQ, "dp - delta[:, None]", "dp + delta[:, None]"),
    Mutant(_DQ, "(dq * scale)", "dq", kinds=("scale",)),
    Mutant(_DQ, "ds = ds * slope", "ds = ds", kinds=("softcap",)),
    Mutant(_DKV, "dk * scale", "dk", kinds=("scale",)),
    Mutant(_KEYS, "dp - delta[None, :]", "dp"),
    # Dropout.
    Mutant(_PRIMITIVES, "tl.philox_impl(c0, c1,", "tl.philox_impl(c1, c0,", kinds=("dropout",)),
    Mutant(_PRIMITIVES, "tl.join(tl.join(w0, w2), tl.join(w1, w3))",
           "tl.join(tl.join(w0, w1), tl.join(w2, w3))", kinds=("dropout",)),
    Mutant(_PRIMITIVES, "first_key // 4 + ", "first_key // 4 + 1 + ", after="def kept_columns", kinds=("dropout",)),
    Mutant(_KEYS, "tl.where(kept, weights * dropout[3], 0.0)", "weights", kinds=("dropout",)),
    Mutant(_KEYS, "tl.where(kept, dp * dropout[3], 0.0)", "dp * dropout[3]", kinds=("dropout",)),
    Mutant(_ATTEND, "(divisor * kept_share)", "divisor", kinds=("dropout",)),
    # Who reads what, and where it lies.
    Mutant(_FORWARD, "kv_head = head // GROUP", "kv_head = head % (tl.num_programs(1) // GROUP)", kinds=("group",)),
    Mutant(_DQ, "kv_head = head // GROUP", "kv_head = head % (tl.num_programs(1) // GROUP)", kinds=("group",)),
    Mutant(_DKV, "kv_head * GROUP + pair % GROUP", "kv_head + pair % GROUP", kinds=("group",)),
    Mutant(_DKV, "tl.load(order + row)", "row", first="corners"),
    Mutant(_KEYS, "tl.load(starts + unit + 1).to(tl.int32) - first",
           "tl.load(starts + unit + 1).to(tl.int32) - first - 1", kinds=("ids",)),
    Mutant(_DKV, "split * share + share, pairs)", "split * share + share - 1, pairs)"),
    Mutant(_DKV, "tl.cdiv(tl.cdiv(max_queries, BLOCK_Q), query_splits)",
           "(tl.cdiv(max_queries, BLOCK_Q) // query_splits)", first="corners"),
    Mutant(_DKV, "range(parts)", "range(1, parts)"),
    Mutant(_DKV, "to(target.dtype.element_ty), mask=index < count", "to(target.dtype.element_ty), mask=index >= 0"),
    Mutant(_ROWS, "kv_head.to(tl.int64) * strides[4]", "kv_head.to(tl.int64) * strides[1]"),
    Mutant(_DKV, "head64 * strides[4]", "head64 * strides[1]"),
    Mutant(_DKV, "load_rows(v_base, strides[5]", "load_rows(v_base, strides[2]"),
    Mutant(_FORWARD, "head.to(tl.int64) * set_strides[SET][7]",
           "head.to(tl.int64) * set_strides[SET][6]", kinds=("bias",)),
    Mutant(_DKV, "row64 * strides[6]", "row64 * 0", first="corners"),
    Mutant(_PRIMITIVES, "row * PADDING", "row", kinds=("packed",)),
    Mutant(_PRIMITIVES, "return low, tile - begins", "return low, tile - begins + 1", kinds=("packed",)),
    Mutant(_FORWARD, "tl.store(lse_base + tile * lse_strides[2], level, mask=valid_queries)",
           "tl.store(lse_base + tile * lse_strides[2], level)"),
    Mutant(_CALL, "(0, tensor.stride(1), tensor.stride(0))",
           "(0, tensor.stride(0), tensor.stride(1))", kinds=("packed",)),
    Mutant(_PLAN, "torch.where(readable, ids.to(torch.int32), num_segments)",
           "torch.where(readable, ids.to(torch.int32), 0)"),
    Mutant(_PLAN, "torch.sort(units, stable=True)",
           "torch.sort(units, descending=True)", kinds=("ids",)),
    Mutant(_CALL, "None if t is None else t.contiguous() for t in lists", "t for t in lists", kinds=("strided",)),
    Mutant(_CALL, "None if t is None else t.contiguous() for t in (given", "t for t in (given", kinds=("strided",)),
    # The split forward and the merge.
    Mutant(_SPLIT, "pair % max_queries, folded % GROUP", "pair % max_queries, pair % GROUP", kinds=("split", "group")),
    Mutant(_SPLIT, "row = tl.load(order + row)", "row = row.to(tl.int64)", kinds=("split", "ids")),
    Mutant(_SPLIT, "tl.cdiv(tl.cdiv(tl.maximum(high - low, 0), chunks), BLOCK_K)",
           "(tl.cdiv(tl.maximum(high - low, 0), chunks) // BLOCK_K)", kinds=("split",)),
    Mutant(_SPLIT, "positions += windowed_length", "positions += 0 * windowed_length", kinds=("split", "in window")),
    Mutant(_SPLIT, "positions = token + offset", "positions = token", kinds=("split",)),
    Mutant(_SPLIT, "valid_queries = folded <= last_query", "valid_queries = folded < last_query", kinds=("split",)),
    Mutant(_SPLIT, "level, mask=valid_queries)",
           'level, mask=valid_queries & (level != float("-inf")))', kinds=("split",)),
    Mutant(_SPLIT, "slots = part * (", "slots = 0 * part * (", kinds=("split",)),
    Mutant(_SPLIT, "stream = row * (tl.num_programs(1) * GROUP) + head", "stream = row * tl.num_programs(1) + head",
           kinds=("split", "dropout")),
    Mutant(_SPLIT, "bias_rows = row64 * strides[6]", "bias_rows = row64 * 0", first="corners"),
    Mutant(_MERGE, "output = output * factor + tl.sum", "output = output + tl.sum", first="corners"),
    Mutant(_MERGE, "total * factor + tl.sum", "total + tl.sum", first="corners"),
    Mutant(_MERGE, "weights = exponential(levels, 1.0, reference, True)",
           "weights = exponential(levels, 1.0, 0.0, True)", kinds=("split",)),
    Mutant(_MERGE, "reference = tl.where(new_maximum == -INFINITY, 0.0, new_maximum)", "reference = new_maximum",
           kinds=("split",)),
    Mutant(_MERGE, "(unit < even(odd_sizes[index][0])), 0, chunks)", "(unit < even(odd_sizes[index][0])), 0, 0)",
           kinds=("split", "ids")),
    Mutant(_MERGE, "read & (parts < first + even(odd_chunks[SETS]))",
           "read & (parts < first + even(odd_chunks[SETS]) + 1)", kinds=("split",)),
    Mutant(_MERGE, "head = kv_head * GROUP + slot % GROUP", "head = kv_head + slot % GROUP", kinds=("split", "group")),
    Mutant(_MERGE, "token = pair % max_queries", "token = pair // kv_heads % max_queries", kinds=("split", "group")),
    # The fused backward of a short prefix.
    Mutant(_SHORT, "(tiles - 1 - item // pairs)", "(item % tiles)", first="short"),
    Mutant(_SHORT, "first_reader + item % pairs // GROUP", "first_reader + item // GROUP", first="short"),
    Mutant(_SHORT, "kv_head * GROUP + item % GROUP", "kv_head + item % GROUP", first="short"),
    Mutant(_SHORT, "store_gradient(dk * scale", "store_gradient(dk", first="short"),
    Mutant(_SHORT, "(dq * scale)", "dq", first="short"),
    Mutant(_SHORT, "weights = tl.where(present[:, None], weights, 0.0)", "weights = weights", first="corners"),
    Mutant(_SHORT, "present = keys < tl.where(unit < number, valid, 0)",
           "present = keys < valid", first="short"),
    Mutant(_SHORT, "exists = keys < tl.where(unit < number, size, 0)", "exists = keys < size", first="short"),
    Mutant(_SHORT, "row * (tl.num_programs(1) * GROUP) + head", "row * tl.num_programs(1) + head",
           first="short"),
    Mutant("prefix_fast/backends/triton_short.py", "count if order is None else count + 1", "count",
           first="short"),
    # Offsets in int32.
    Mutant(_FORWARD, "row.to(tl.int64) * query_strides[0]", "row * query_strides[0]", far=("rows",)),
    Mutant(_FORWARD, "head.to(tl.int64) * query_strides[1]", "head * query_strides[1]", far=("heads",)),
    Mutant(_FORWARD, "row, head = row.to(tl.int64), head.to(tl.int64)", "row, head = row, head", far=("rows",)),
    Mutant(_ATTEND, "first = tl.cast(start, tl.int64)", "first = start", far=("long rows",)),
    Mutant(_ROWS, "kv_head.to(tl.int64) * strides[1]", "kv_head * strides[1]", far=("key heads",)),
    Mutant(_ROWS, "unit.to(tl.int64) * strides[3]", "unit * strides[3]", far=("segments",)),
    Mutant(_ROWS, "tile.to(tl.int64) * mask_stride", "tile * mask_stride", far=("bias keys",)),
    Mutant(_ROWS, "keys.to(tl.int64)[None, :] * key_stride", "keys[None, :] * key_stride", far=("bias keys",)),
    Mutant(_DQ, "row64, head64, token = row.to(tl.int64), head.to(tl.int64)", "row64, head64, token = row, head",
           far=("split rows",)),
    Mutant(_DQ, "first = tl.cast(start, tl.int64)", "first = start", far=("long rows",)),
    Mutant(_DKV, "unit64, head64, token = unit.to(tl.int64)", "unit64, head64, token = unit", far=("segments",)),
    Mutant(_DKV, "row64, head64 = row.to(tl.int64)", "row64, head64 = row", far=("rows",)),
    Mutant(_DKV, "first = tl.cast(start, tl.int64)", "first = start", far=("long rows",)),
    Mutant(_PRIMITIVES, "row.to(tl.int64) * stride", "row * stride", far=("offsets",)),
    Mutant(_PRIMITIVES, "first = tl.load(cu_seqlens + unit).to(tl.int64)",
           "first = tl.load(cu_seqlens + unit).to(tl.int32)",
           far=("packed tokens", "packed keys")),
    Mutant(_SPLIT, "row64, head64 = row.to(tl.int64), head.to(tl.int64)", "row64, head64 = row, head.to(tl.int64)",
           far=("split rows",)),
    Mutant(_SPLIT, "row64, head64 = row.to(tl.int64), head.to(tl.int64)", "row64, head64 = row.to(tl.int64), head",
           far=("split heads",)),
    Mutant(_SPLIT, "unit64, kv_head64 = unit.to(tl.int64), kv_head", "unit64, kv_head64 = unit, kv_head",
           far=("split segments",)),
    Mutant(_SPLIT, "unit.to(tl.int64), kv_head.to(tl.int64)", "unit.to(tl.int64), kv_head", far=("split key heads",)),
    Mutant(_SPLIT, "token.to(tl.int64) * strides[8]", "token * strides[8]", far=("split bias queries",)),
    Mutant(_MERGE, "row, head, token = row.to(tl.int64), head", "row, head, token = row, head", far=("split rows",)),
    Mutant(_SHORT, "row64, head64, token = row.to(tl.int64)", "row64, head64, token = row", far=("rows",)),
    Mutant(_SHORT, "unit64, head64 = segment.to(tl.int64)", "unit64, head64 = segment", far=("segments",)),
]  # fmt: skip


def package_of(mutant: Mutant, folder: Path) -> None:
    """Make the package in the folder: links to the sources, and one file changed."""
    for source, target in (("prefix_fast", "prefix_fast"), ("kernels", "prefix_fast/kernels")):
        for path in sorted((ROOT / source).rglob("*")):
            place = folder / target / path.relative_to(ROOT / source)
            if path.is_dir() or "__pycache__" in path.parts:
                continue
            place.parent.mkdir(parents=True, exist_ok=True)
            if str(path.relative_to(ROOT)) != mutant.file:
                place.symlink_to(path)
                continue
            text = path.read_text("utf-8")
            begin = text.find(mutant.old, max(text.find(mutant.after), 0))
            if begin < 0 or mutant.after not in text:
                raise LookupError(f"{mutant.file} has no {mutant.old!r}: the mutant must follow the source")
            place.write_text(text[:begin] + mutant.new + text[begin + len(mutant.old) :], "utf-8")


def killer(mutant: Mutant) -> str:
    """The first check that fails on the mutant whose package comes first on sys.path; empty: none."""
    import triton_cases
    import triton_far
    import triton_short

    checks = [(f"far {name}", triton_far.check, triton_far.CALLS[name]) for name in mutant.far]
    if not mutant.far:
        random_calls = (triton_cases.random_call(seed, torch.float32) for seed in SEEDS)
        fitting = (call for call in random_calls if all(triton_cases.KINDS[kind](call) for kind in mutant.kinds))
        listed = {"corners": triton_cases.CORNERS, "short": (*triton_short.FLAGS, *triton_short.SIZES)}
        calls = itertools.chain(listed.get(mutant.first, ()), fitting)
        checks = ((str(call.case.seed), triton_cases.check, call) for call in itertools.islice(calls, TRIES))
    for name, check, call in checks:
        try:
            check(call)
        except Exception as error:
            return f"{name}: {type(error).__name__}: {str(error)[:90]}"
    return ""


def killed(mutant: Mutant) -> str:
    """`killer` from a process that has imported nothing of the package before."""
    with tempfile.TemporaryDirectory() as folder:
        package_of(mutant, Path(folder))
        reader, writer = os.pipe()
        if (child := os.fork()) == 0:
            try:
                os.close(reader)
                sys.path.insert(0, folder)
                torch.set_num_threads(1)
                with contextlib.redirect_stderr(io.StringIO()), warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    answer = killer(mutant)
                    if Path(sys.modules["prefix_fast"].__path__[0]).parent != Path(folder):
                        answer = ""
                os.write(writer, answer.encode())
            finally:
                os._exit(0)
        os.close(writer)
        with os.fdopen(reader) as pipe:
            answer = pipe.read()
        os.waitpid(child, 0)
        return answer


def main(arguments: list[str]) -> int:
    """Run mutants; print how each was seen. Returns the number of those that nothing saw."""
    survivors = 0
    for number in map(int, arguments) if arguments else range(len(MUTANTS)):
        mutant = MUTANTS[number]
        answer = killed(mutant)
        survivors += not answer
        print(f"{number} {mutant.file}: {mutant.old!r} -> {mutant.new!r}: {answer or 'SURVIVES'}", flush=True)
    print(f"{survivors} survivors")
    return survivors
