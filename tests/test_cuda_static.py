"""The machine code of the CUDA kernels for every architecture: the kept table, its limits, and what compiles anew."""

import importlib.util
from dataclasses import replace
from typing import Any

import pytest

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed: its cuobjdump takes the code apart", allow_module_level=True)

from cuda_code import ARCHITECTURES, HALF, UNITS, Kernel, fingerprint, kernel_of, tile_loops, words_of
from cuda_table import Row, faults_of, load, release_of, rows_of
from machine_code import Instruction, natural_loops, parse_sass

from prefix_fast.cuda_build import find_toolkit

RELEASE, TABLE = load()
TOOLKIT = find_toolkit()
same_release = pytest.mark.skipif(
    TOOLKIT is None or release_of(TOOLKIT) != RELEASE, reason=f"the table is of {RELEASE}; another compiles other code"
)
SAMPLE = (("short_prefix", "fp16", 80), ("backward_dq", "tf32", 120))


def test_table_is_of_the_present_sources() -> None:
    assert {row.fingerprint for row in TABLE.values()} == {fingerprint(*unit) for unit in UNITS}, (
        "run `make bench-static`"
    )
    assert {row.architecture for row in TABLE.values()} == set(ARCHITECTURES)
    assert len(TABLE) > 600


# Most spills in loops, and largest ratio to Triton's. Sums of 256 dims leave half of the registers for options; those
# in loops are in the loop over readers, not over tiles. Products of tf32 read rounded numbers, Triton's cut them off:
# where float32 rows leave room for few warps, each thread rounds many.
TOLERATED = {
    ("half", "dkv", 256, "options keys"): (6, 0),
    ("half", "decode", 256, "options"): (0, 0),
    ("tf32", "dq", 128, ""): (0, 1.3),
}


def test_no_kernel_of_the_table_has_a_fault_but_those_tolerated() -> None:
    faulty = [row for row in TABLE.values() if faults_of(row)]
    named = {row.key: ("half" if row.products in HALF else row.products, *row.key[2:]) for row in faulty}
    assert set(named.values()) == set(TOLERATED)
    for row in faulty:
        spills, ratio = TOLERATED[named[row.key]]
        assert row.spills_in_loops <= spills, row
        assert all(of is None or of <= max(ratio, 1.1) for *_, of in row.loops.values()), row
        assert all("spills" in fault or "Triton" in fault for fault in faults_of(row)), row


def test_loops_of_every_architecture_are_held_to_tritons() -> None:
    compared = [row for row in TABLE.values() if any(ratio is not None for *_, ratio in row.loops.values())]
    assert {row.architecture for row in compared} == set(ARCHITECTURES)
    assert {row.kernel for row in compared} == {"forward", "decode", "dq", "dkv", "short"}
    assert {row.head_dim for row in compared} == {64, 80, 96, 128, 256}


@same_release
@pytest.mark.parametrize(("source", "products", "architecture"), SAMPLE)
def test_sampled_source_compiles_to_its_rows(source: str, products: str, architecture: int) -> None:
    rows = list(rows_of(TOOLKIT, source, products, (80, architecture) if architecture > 80 else (80,)))
    assert len(rows) >= 3
    assert all(TABLE[row.key] == row for row in rows)


@same_release
@pytest.mark.slow
@pytest.mark.parametrize(("source", "products"), UNITS)
def test_every_source_compiles_to_its_rows(source: str, products: str) -> None:
    rows = {row.key: row for row in rows_of(TOOLKIT, source, products)}
    mark = fingerprint(source, products)
    assert rows == {key: row for key, row in TABLE.items() if row.fingerprint == mark}


GOOD = Row(80, "fp16", "dq", 64, "", 233, 0, 0, 0, 8, {"whole": (352, 96, 0.98), "edge": (1047, 96, None)})


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"spills": 2, "spills_in_loops": 1, "stack": 8}, "2 spills, 1 in loops, stack 8"),
        ({"warps": 4}, "4 resident warps < 8"),
        ({"loops": {}}, "no products"),
        ({"loops": {"loop 0": (352, 96, None)}}, "1 loops"),
        ({"loops": {"whole": (420, 96, 1.101)}}, "whole 1.101 × Triton's"),
    ],
)
def test_fault_is_found(change: dict[str, Any], fault: str) -> None:
    assert faults_of(GOOD) == []
    assert faults_of(replace(GOOD, **change)) == [fault]


def test_kernels_are_known_by_their_symbols() -> None:
    begin, end = "_ZN11prefix_fast4cuda", "EEvNS0_4CallENS0_7ResultsE"
    for symbol, kernel in (
        ("14forward_kernelINS0_14ForwardShapeOfI6__halfLi128EEELb1E", Kernel("forward", 128, (True,))),
        ("10dkv_kernelINS0_10DkvShapeOfIfLi256ELb0EEELb0ELb1ELb0E", Kernel("dkv", 256, (False, True, False))),
        ("13decode_kernelINS0_12DecodeShapesI6__halfLi64ELb1EEELb1E", Kernel("decode", 64, (True,))),
        ("12short_kernelINS0_10ShortShapeI6__halfLi96ELi16EE", Kernel("short", 96, ())),
        ("14prepare_kernelI6__half", Kernel("prepare", 0, ())),
    ):
        assert kernel_of(begin + symbol + end) == kernel
    with pytest.raises(LookupError):
        kernel_of("_Z3addPf")


def program_of(*lines: str) -> tuple[list[Instruction], list[frozenset[int]]]:
    listing = "\n".join(f"        /*{16 * n:04x}*/  {line} ;  /* 0x0 */" for n, line in enumerate(lines))
    program = parse_sass(listing)
    return program, natural_loops(program)


@pytest.mark.parametrize(("add", "compare"), [
    ("IADD3 R10, R10, {}, RZ", "ISETP.GE.U32.AND P0, PT, R10, 0x40, PT"),
    ("IADD3 R10, PT, PT, R10, {}, RZ", "ISETP.GE.U32.AND P0, PT, R10, 0x40, PT"),  # of sm_100
    ("VIADD R10, R10, {}", "ISETP.GE.U32.AND P0, PT, R10, 0x40, PT"),
    ("UIADD3 UR4, UPT, UPT, UR4, {}, URZ", "UISETP.GE.U32.AND UP0, UPT, UR4, 0x40, UPT"),
])  # fmt: skip
@pytest.mark.parametrize("step", [4, 8])
def test_loops_of_products_within_a_tile_count_their_turns(add: str, compare: str, step: int) -> None:
    lines = (
        "MOV R1, R2",
        "IADD3 R3, R3, 0x1, RZ",  # 0x10: a tile
        "FFMA R4, R5, R6, R4",  # 0x20: some columns of the head dim
        add.format(hex(step)),
        compare,
        "@P0 BRA 0x20",
        "FFMA R7, R8, R9, R7",
        "@P1 BRA 0x10",
        "EXIT",
    )
    assert tile_loops(*program_of(*lines), 64) == [(3 + 4 * (64 // step), 1 + 64 // step)]
    assert tile_loops(*program_of(*lines), 0) == [(4, 1)]
    with pytest.raises(LookupError, match="no counter up to 128"):
        tile_loops(*program_of(*lines), 128)


def test_turns_of_a_loop_that_writes_results_are_not_known() -> None:
    lines = ("MOV R1, R2", "IADD3 R3, R3, 0x1, RZ", "FFMA R4, R5, R6, R4", "STG.E [R2.64], R4", "@P0 BRA 0x20",
             "@P1 BRA 0x10", "EXIT")  # fmt: skip
    assert tile_loops(*program_of(*lines), 64) == [(5, 1)]


def test_comments_alone_do_not_make_a_table_stale() -> None:
    assert words_of("int a;  // one\n/* two\n */ int b;") == words_of("int a;\nint b;")
    assert words_of("int a;") != words_of("int b;")
