"""The machine code of the Triton kernels, compiled ahead of time: limits, the kept table, and what compiles anew."""

import importlib.util
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)
if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
    pytest.skip("TRITON_INTERPRET is set: the kernels are not compiled", allow_module_level=True)

import triton
from figures import Row, faults_of, programs_together, row_of, works_of
from interpreted import run_python
from launches import Launch, Shape, launches_of, problem_of
from machine_code import matrix_loops, natural_loops, parse_amd, parse_sass, work_of
from registry import CONFIGURATIONS, ENTRIES, UNMASKED, Call, call_named
from sources import words_of
from table import fingerprints, load

RELEASE, TABLE = load()
SAMPLE = [
    ("sm_80", "D128 bf16", "dkv own"),
    ("sm_86", "D64 bf16", "dq"),
    ("sm_89", "D64 fp16", "forward"),
    ("sm_90", "D64 bf16", "forward"),
    ("sm_90", "D128 bf16", "dq"),
    ("sm_100", "D64 bf16", "dkv prefix"),
    ("sm_120", "D128 bf16", "forward"),
    ("gfx942", "D64 bf16", "dkv prefix"),
]
same_release = pytest.mark.skipif(
    triton.__version__ != RELEASE,
    reason=f"the table is of Triton {RELEASE}; another compiles to other code"
    if RELEASE
    else "run `make bench-static`",
)


@same_release
def test_table_is_of_the_present_kernels_and_configurations() -> None:
    expected = fingerprints()
    assert len(expected) > 500
    stale = [key for key, value in expected.items() if key not in TABLE or TABLE[key].fingerprint != value]
    assert not stale, f"{len(stale)} rows are stale, as {stale[0]}: run `make bench-static`"
    assert set(TABLE) == set(expected)


@same_release
@pytest.mark.parametrize("key", SAMPLE, ids=" ".join)
def test_sampled_kernel_compiles_to_its_row(key: tuple[str, str, str]) -> None:
    architecture, call, kernel = key
    (work,) = works_of(call_named(call), architecture, kernel)
    assert row_of(work) == TABLE[key]


@same_release
@pytest.mark.slow
@pytest.mark.parametrize(("architecture", "call"), CONFIGURATIONS, ids=str)
def test_every_kernel_compiles_to_its_row(architecture: str, call: Call) -> None:
    for work in works_of(call, architecture):
        assert row_of(work) == TABLE[work.name]


# No tile that was tried does without: a few spills where tf32x3 holds each operand twice or a head dim is padded, and
# two loops of small tiles. Most spills in loops, largest ratio to the plain kernel.
TOLERATED = {
    ("sm_80", "D128 fp32-ieee", "dkv own"): (1, 1.08),
    ("sm_80", "D128 fp32-tf32x3", "dkv own"): (3, 1.08),
    ("sm_80", "D128 fp32-tf32", "forward"): (0, 1.11),
    ("sm_86", "D128 fp32-tf32", "forward"): (0, 1.09),
    ("sm_89", "D128 fp32-tf32", "forward"): (0, 1.09),
    ("sm_90", "D80 bf16", "dkv prefix"): (1, 1.08),
    ("sm_90", "D96 bf16", "dkv prefix"): (1, 1.08),
    ("sm_90", "D128 fp32-tf32x3", "dkv prefix"): (5, 1.08),
    ("sm_90", "D128 fp32-tf32x3", "dkv own"): (6, 1.08),
    ("sm_90", "D256 fp32-ieee", "dkv own"): (2, 1.08),
    ("sm_100", "D64 fp32-tf32", "forward"): (0, 1.09),
    ("sm_100", "D128 fp32-tf32x3", "dkv prefix"): (5, 1.08),
    ("sm_100", "D128 fp32-tf32x3", "dkv own"): (6, 1.08),
    ("sm_100", "D64 bf16 B4 T1 Tk64 P16", "forward"): (0, 1.09),
    ("sm_100", "D128 bf16 B4 T1 Tk64 P16", "forward"): (0, 1.09),
    ("sm_120", "D256 bf16 safe", "dkv own"): (3, 1.08),
    ("sm_120", "D128 fp32-tf32x3", "dkv prefix"): (4, 1.08),
    ("sm_120", "D128 fp32-tf32x3", "dkv own"): (7, 1.08),
}


def test_no_kernel_of_the_table_has_a_fault_but_those_tolerated() -> None:
    faulty = {key: faults for key, row in TABLE.items() if (faults := faults_of(row))}
    assert set(faulty) == set(TOLERATED)
    for key, (spills, ratio) in TOLERATED.items():
        row = TABLE[key]
        assert row.spills_in_loops <= spills, key
        assert all(of is None or of <= ratio for name, (_, _, of) in row.loops.items() if name in UNMASKED), key
        assert all("spills in loops" in fault or "plain" in fault for fault in faulty[key]), key


GOOD = Row(
    "sm_90", "D64 bf16", "dq", (128, 64, 8, 2), 160, 0, 0, 0, 65536, 1, 48, {"prefix": (277, 12, 1.0)}, ""
)  # fmt: skip


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"spills_in_loops": 1}, "1 spills in loops"),
        ({"stack": 136}, "stack 136"),
        ({"registers": 32}, "32 registers"),
        ({"shared": 232449}, "shared 232449 > 232448"),
        ({"occupancy": 0}, "0 resident warps < 8"),
        ({"matrix": 0}, "no matrix instructions"),
        ({"loops": {"loop 0": (277, 12, None)}}, "1 loops"),
        ({"loops": {"prefix": (277, 12, None)}}, "prefix has no counterpart"),
        ({"loops": {"own": (277, 12, 1.141)}}, "own 1.141 × plain"),
        ({"kernel": "forward", "loops": {"own": (277, 12, 1.09)}}, "own 1.090 × plain"),
        ({"architecture": "gfx942", "loops": {"own": (277, 12, 1.09)}}, "own 1.090 × plain"),
    ],
)
def test_fault_is_found(change: dict[str, Any], fault: str) -> None:
    assert faults_of(GOOD) == []
    assert fault in faults_of(replace(GOOD, **change))


def test_programs_together_are_limited_by_each_resource() -> None:
    assert programs_together("sm_90", 8, 128, 0, 0) == 2
    assert programs_together("sm_90", 8, 129, 0, 0) == 1
    assert programs_together("sm_80", 4, 32, 100000, 0) == 1
    assert programs_together("sm_100", 4, 32, 1024, 256) == 2
    assert programs_together("gfx942", 4, 256, 16384, 0) == 2
    assert programs_together("gfx942", 4, 257, 16384, 0) == 1
    assert programs_together("sm_86", 1, 16, 0, 0) == 16


def sass(*lines: str) -> str:
    return "\n".join(f"        /*{16 * n:04x}*/  {line} ;  /* 0x0 */" for n, line in enumerate(lines))


def test_loops_are_found_where_waiting_is_out_of_line() -> None:
    program = parse_sass(sass(
        "MOV R1, R2",
        "HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], R24",  # 0x10: the head of the loop
        "@!P0 BRA 0x60",
        "STL [R1], R3",
        "@P1 BRA 0x10",
        "EXIT",
        "SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR9], R4",  # 0x60: waits, then goes on within the loop
        "@!P0 BRA 0x60",
        "BRA 0x30",
    ))  # fmt: skip
    bodies = natural_loops(program)
    assert bodies == [frozenset({1, 2, 3, 4, 6, 7, 8}), frozenset({6, 7})]
    (loop,) = matrix_loops(program, bodies)
    assert (loop.instructions, loop.matrix, loop.work) == (7, 1, 64 * 64 * 16)


def test_inner_loop_counts_and_not_the_one_around_it() -> None:
    program = parse_amd("""
	s_mov_b32 s0, 0
.LBB0_1:
	v_mov_b32 v0, v1
.LBB0_2:
	v_mfma_f32_32x32x8_bf16 v[0:15], v[2:3], v[4:5], v[0:15]
	scratch_load_dword v9, off, off offset:8 ; 4-byte Folded Reload
	s_cbranch_scc1 .LBB0_2
	s_cbranch_scc1 .LBB0_1
	s_endpgm
.amdhsa_kernel f
	v_mov_b32 v0, v1
""")
    assert len(program) == 7
    bodies = natural_loops(program)
    assert [len(body) for body in bodies] == [5, 3]
    assert [(loop.instructions, loop.matrix) for loop in matrix_loops(program, bodies)] == [(3, 1)]


def test_work_of_matrix_instructions_is_their_shape() -> None:
    listing = sass("HMMA.16816.F32.BF16 R4, R8, R10, R4", "HMMA.1688.F32.TF32 R4, R8, R10, R4", "UTCHMMA gdesc[UR4]")
    assert [work_of(instruction) for instruction in parse_sass(listing)] == [2048, 1024, 1]
    listing = "\tv_mfma_f32_16x16x4_f32 v[0:3], v4, v5, v[0:3]\n\tv_mfma_f32_32x32x8_bf16 v[0:15], v[2:3], v[4:5], 0"
    assert [work_of(instruction) for instruction in parse_amd(listing)] == [1024, 8192]


def test_fingerprint_ignores_comments_alone() -> None:
    plain = "def f(x):\n    y = x + 1\n    return y\n"
    noted = 'def f(x):\n    """Text."""\n\n    y = x + 1  # one more\n    return y\n'
    assert words_of(plain) == words_of(noted)
    for other in (plain.replace("+ 1", "+ 2"), plain.replace("    return", "return"), plain.replace("x +", '"x" +')):
        assert words_of(other) != words_of(plain)


def test_plain_flash_attention_is_attention(root: Path) -> None:
    run_python(root, root / "tests" / "triton_plain_flash.py")


def specialisations(shapes: list[Shape], **options: Any) -> dict[str, set[str]]:
    """Every kernel, and under how many keys Triton would compile it; split partial sums are kernels of their own."""
    found: dict[str, set[str]] = {}
    for shape in shapes:
        for launch in launches_of(problem_of(shape, **{k: v(shape) for k, v in options.items()}), "sm_90"):
            found.setdefault(kernel_of(launch), set()).add(launch.specialisation)
    return found


def kernel_of(launch: Launch) -> str:
    target = launch.signature.get("grad_key", "")
    blocks = (launch.tile.queries, launch.constant("BLOCK_OWN"))  # rows of few queries have smaller ones
    return f"{launch.kernel} {launch.constant('SET')} {target} {blocks}"


def specialisations_of_forward(shape: Shape, **options: Any) -> set[str]:
    found = specialisations([shape], **options)
    return set().union(*(keys for kernel, keys in found.items() if kernel.startswith("forward_kernel")))


BASE = Shape(12, 12, 64)
SIZES = [
    *(replace(BASE, B=B) for B in (1, 2, 3, 16, 33)),
    *(replace(BASE, T=T) for T in (1, 2, 16, 17, 511, 4096)),
    *(replace(BASE, P=P) for P in (1, 5, 16, 100, 500, 8192)),
    *(replace(BASE, T=T, Tk=Tk) for T, Tk in ((1, 1), (1, 16), (1, 1000), (16, 600), (100, 1024))),
]


def per_row(shape: Shape) -> torch.Tensor:
    return torch.empty(shape.B, dtype=torch.int64, device="meta")


def packed(heads: str) -> Callable[[Shape], torch.Tensor]:
    def tensor(shape: Shape) -> torch.Tensor:
        tokens = shape.B * shape.T
        return torch.empty(tokens, getattr(shape, heads), shape.D, dtype=shape.dtype, device="meta")

    return tensor


def offsets(shape: Shape) -> torch.Tensor:
    return torch.empty(shape.B + 1, dtype=torch.int32, device="meta")


PACKED = {
    "query": packed("H"), "key": packed("Hkv"), "value": packed("Hkv"), "cu_seqlens_q": offsets,
    "cu_seqlens_k": offsets,
}  # fmt: skip


def mask(shape: Shape) -> torch.Tensor:
    return torch.empty(shape.B, shape.Tk or shape.T, dtype=torch.bool, device="meta")


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"key_mask": mask},
        {"query_offset": per_row},
        {"query_offset": lambda shape: shape.P},
        {"window": lambda shape: shape.T},
        PACKED,
    ],
    ids=["plain", "key_mask", "offsets", "offset", "window", "packed"],
)
def test_sizes_compile_nothing_anew(options: dict[str, Any]) -> None:
    found = specialisations(SIZES, **options)
    assert {"forward_kernel", "reduce_kernel"} <= {kernel.split()[0] for kernel in found}
    assert {kernel: len(keys) for kernel, keys in found.items() if len(keys) > 1} == {}


def test_number_of_prefixes_compiles_nothing_anew() -> None:
    found = specialisations([replace(BASE, N=N, B=B) for N in (2, 3, 16, 17) for B in (1, 16, 20)])
    assert len(found) >= 4
    assert {kernel: len(keys) for kernel, keys in found.items() if len(keys) > 1} == {}


def test_row_lengths_of_a_bias_are_of_two_kinds() -> None:
    def bias(shape: Shape) -> torch.Tensor:
        return torch.empty(1, shape.H, shape.T, shape.T, dtype=shape.dtype, device="meta")

    for lengths, kinds in (((128, 512, 4096), 1), ((129, 511, 1002), 1), ((128, 129, 511, 512), 2)):
        keys = (specialisations_of_forward(replace(BASE, T=T), attn_bias=bias) for T in lengths)
        assert len(set().union(*keys)) == kinds


def test_head_dim_dtype_and_flags_compile_anew() -> None:
    base = specialisations_of_forward(BASE)
    assert len(base) == 1
    for shape, options in (
        (replace(BASE, D=128), {}),
        (replace(BASE, dtype=torch.float16), {}),
        (BASE, {"softcap": lambda shape: 30.0}),
        (BASE, {"is_causal": lambda shape: False}),
    ):
        assert specialisations_of_forward(shape, **options).isdisjoint(base)


def test_every_kernel_has_an_entry(root: Path) -> None:
    kernels = {
        name
        for file in (root / "kernels").glob("*.py")
        for line in file.read_text(encoding="utf-8").splitlines()
        if line.startswith("def ") and (name := line[4:].split("(")[0]).endswith("_kernel")
    }
    # One program for each row and no matrix product: it has no tiles whose registers and loops the table could limit.
    assert kernels - {"cross_entropy_kernel"} == {entry.function for entry in ENTRIES}
