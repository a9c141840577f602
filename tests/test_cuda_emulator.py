"""The emulator of CUDA: the facts of its instructions, and every check against a kernel that is wrong in that way.

Layouts are those of the PTX ISA ("Matrix Fragments for mma.m16n8k16", "... m16n8k8", "ldmatrix"), written down here
as the manual has them: an element's row and column from the lane's group (lane / 4), its number in the group
(lane % 4) and the register. Fragments are laid out by these tables, and the product is compared with a plain one.
"""

import re

import pytest
import torch
from cuda_compile import EMULATOR, compiled, unavailable
from cuda_harness import CHECKS, SHARED_LIMITS, Machine
from random_calls import as_tf32

pytestmark = pytest.mark.skipif(bool(unavailable()), reason=unavailable() or "runs")

LAYOUTS = EMULATOR / "kernels" / "layouts.cu"
ACCESSES, ORDER = EMULATOR / "kernels" / "wrong_accesses.cu", EMULATOR / "kernels" / "wrong_order.cu"

# For register i of a 16-bit fragment: (row, column) of its lower and of its upper half.
A16 = {
    0: lambda g, t: ((g, 2 * t), (g, 2 * t + 1)),
    1: lambda g, t: ((g + 8, 2 * t), (g + 8, 2 * t + 1)),
    2: lambda g, t: ((g, 2 * t + 8), (g, 2 * t + 9)),
    3: lambda g, t: ((g + 8, 2 * t + 8), (g + 8, 2 * t + 9)),
}
B16 = {
    0: lambda g, t: ((2 * t, g), (2 * t + 1, g)),
    1: lambda g, t: ((2 * t + 8, g), (2 * t + 9, g)),
}
# For register i of a tf32 fragment, and of the sums.
A8 = {0: lambda g, t: (g, t), 1: lambda g, t: (g + 8, t), 2: lambda g, t: (g, t + 4), 3: lambda g, t: (g + 8, t + 4)}
B8 = {0: lambda g, t: (t, g), 1: lambda g, t: (t + 4, g)}
D = {
    0: lambda g, t: (g, 2 * t),
    1: lambda g, t: (g, 2 * t + 1),
    2: lambda g, t: (g + 8, 2 * t),
    3: lambda g, t: (g + 8, 2 * t + 1),
}

# The check that catches each kernel of wrong_*.cu.
WRONG_KERNELS = {
    "read_behind": "out of bounds",
    "write_before": "out of bounds",
    "dynamic_behind": "out of bounds",
    "static_behind": "out of bounds",
    "copy_behind": "out of bounds",
    "write_input": "read-only write",
    "misaligned_load": "misaligned",
    "misaligned_copy": "misaligned",
    "misaligned_rows": "misaligned",
    "unwritten_shared": "uninitialised read",
    "unwritten_global": "uninitialised read",
    "unwritten_rows": "uninitialised read",
    "read_unordered": "race",
    "write_unordered": "race",
    "write_twice": "race",
    "halves_of_a_word": "race",
    "warp_unordered": "race",
    "part_of_a_warp_unordered": "race",
    "shuffle_orders_nothing": "race",
    "named_too_narrow": "race",
    "arrival_too_early": "race",
    "atomic_and_plain": "race",
    "blocks_write_one": "race",
    "blocks_add": "race",
    "writers_without_fence": "race",
    "reader_without_fence": "race",
    "copy_for_others": "race",
    "refill_too_early": "race",
    "barrier_in_a_branch": "barrier divergence",
    "two_barriers": "barrier divergence",
    "named_miscount": "barrier divergence",
    "shuffle_in_a_branch": "warp divergence",
    "shuffle_from_outside": "warp divergence",
    "product_of_half_a_warp": "warp divergence",
    "copy_not_awaited": "missing wait",
    "wait_a_stage_early": "missing wait",
    "copy_not_committed": "missing wait",
    "copy_left_behind": "in flight at exit",
    "endless": "runaway",
}


@pytest.fixture(scope="module")
def layouts():
    return compiled(LAYOUTS)


def source_of(kernel):
    """The file with a wrong kernel."""
    return next(path for path in (ACCESSES, ORDER) if f"PROBE({kernel}," in path.read_text())


def fragment(matrix, table, registers):
    """[32, registers (, 2)]: what each lane holds of the matrix."""
    lanes = []
    for lane in range(32):
        places = [table[i](lane // 4, lane % 4) for i in range(registers)]
        lanes.append([[float(matrix[p]) for p in place] if isinstance(place[0], tuple) else float(matrix[place])
                      for place in places])  # fmt: skip
    return torch.tensor(lanes, dtype=matrix.dtype)


@pytest.mark.parametrize("kind", ["f16", "bf16", "tf32"])
def test_mma_of_fragments_laid_out_by_the_manual_is_the_product(layouts, kind):
    generator = torch.Generator().manual_seed(7)
    inner = 8 if kind == "tf32" else 16
    dtype = {"f16": torch.float16, "bf16": torch.bfloat16, "tf32": torch.float32}[kind]
    a, b = torch.randn(16, inner, generator=generator).to(dtype), torch.randn(inner, 8, generator=generator).to(dtype)
    if kind == "tf32":  # eleven bits of mantissa, so that the tensor core loses nothing
        a, b = a.half().float(), b.half().float()
    d = torch.randn(16, 8, generator=generator)
    tables = (A8, B8) if kind == "tf32" else (A16, B16)
    machine = Machine(layouts, seed=3)
    sums = machine.writable(fragment(d, D, 4), "d")
    left, right = (fragment(m, t, r).view(torch.int32) for m, t, r in ((a, tables[0], 4), (b, tables[1], 2)))
    assert machine.call(f"multiply_{kind}", machine.input(left, "a"), machine.input(right, "b"), sums) == 0
    machine.assert_clean()
    expected = fragment((d.double() + a.double() @ b.double()).float(), D, 4)
    torch.testing.assert_close(sums, expected, rtol=1e-6, atol=1e-6)
    assert (machine.counters.mma, machine.counters.mma_most) == (1, 1)


def test_mma_reads_every_element_at_its_own_place(layouts):
    """A one at (m, k) of A and at (k, n) of B gives a one at (m, n) alone: no error of a layout can cancel."""
    for m, k, n in [(0, 0, 0), (3, 1, 5), (11, 7, 2), (15, 8, 7), (8, 15, 1), (6, 10, 4)]:
        a, b, expected = torch.zeros(16, 16).half(), torch.zeros(16, 8).half(), torch.zeros(16, 8)
        a[m, k] = b[k, n] = expected[m, n] = 1
        machine = Machine(layouts)
        sums = machine.writable(torch.zeros(32, 4), "d")
        left, right = fragment(a, A16, 4).view(torch.int32), fragment(b, B16, 2).view(torch.int32)
        machine.call("multiply_f16", machine.input(left, "a"), machine.input(right, "b"), sums)
        assert torch.equal(sums, fragment(expected, D, 4))


def test_tf32_is_the_nearest_and_keeps_what_is_no_number(layouts):
    unit = 2.0**-10  # of tf32 at 1
    odd = torch.tensor([0.0, -0.0, 1.0, 1 + unit / 2, 1 + unit * 0.499, -1 - unit / 2, 2 - unit / 2, 2 - unit * 0.51,
                        2.0**-126, 3.0e38, 3.4028e38, -3.4028e38, torch.inf, -torch.inf, torch.nan])  # fmt: skip
    given = torch.cat([odd, -torch.tensor([0x7FFFFFFF], dtype=torch.int32).view(torch.float32),
                       torch.randn(16, generator=torch.Generator().manual_seed(9))])  # fmt: skip
    machine = Machine(layouts)
    rounded = machine.uninitialised(torch.empty(32), "rounded")
    assert machine.call("round_to_tf32", machine.input(given, "given"), rounded) == 0
    machine.assert_clean()
    numbers = given.isfinite() & (given.abs() < 3.4e38)
    assert torch.equal(rounded[numbers].view(torch.int32), as_tf32(given[numbers]).view(torch.int32))
    assert torch.equal(rounded[10:12], torch.tensor([torch.inf, -torch.inf]))  # beyond the largest
    assert torch.equal(rounded[12:14], given[12:14])
    assert rounded[14:16].isnan().all()


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("matrices", [2, 4])
def test_ldmatrix_gives_each_lane_its_elements(layouts, matrices, transposed):
    """Register i of a lane holds elements 2t and 2t + 1 of row g of matrix i; transposed, of column g."""
    rows = torch.arange(32 * 8, dtype=torch.int16).view(32, 8)
    order = torch.randperm(32, generator=torch.Generator().manual_seed(1)).to(torch.int32)
    machine = Machine(layouts, seed=2)
    registers = machine.uninitialised(torch.empty(32, matrices, dtype=torch.int32), "registers")
    machine.call("load_matrices", machine.input(rows, "rows"), machine.input(order, "order"), registers, matrices,
                 int(transposed), 16)  # fmt: skip
    machine.assert_clean()
    tiles = rows[order.long()].view(4, 8, 8)
    for lane in range(32):
        g, t = lane // 4, lane % 4
        for i in range(matrices):
            tile = tiles[i].T if transposed else tiles[i]
            assert registers[lane, i : i + 1].view(torch.int16).tolist() == tile[g, 2 * t : 2 * t + 2].tolist()


@pytest.mark.parametrize("width", [32, 8])
def test_shuffles_read_the_lane_that_the_manual_names(layouts, width):
    values = torch.arange(32.0)
    for kind, operand in [(0, 3), (1, 5), (2, 2), (3, 3)]:
        machine = Machine(layouts, seed=kind)
        out = machine.uninitialised(torch.empty(32), "out")
        machine.call("shuffle_lanes", machine.input(values, "in"), out, kind, operand, width)
        machine.assert_clean()
        for lane in range(32):
            first, last = lane // width * width, lane // width * width + width - 1
            source = {0: first + operand % width, 1: lane ^ operand, 2: lane - operand, 3: lane + operand}[kind]
            assert out[lane] == (source if first <= source <= last else lane)


def test_votes_count_the_lanes_of_their_mask(layouts):
    values = torch.tensor([1.0 if lane % 3 == 0 or lane >= 20 else -1.0 for lane in range(32)])
    machine = Machine(layouts, seed=4)
    out = machine.uninitialised(torch.empty(3, 32, dtype=torch.int32), "out")
    machine.call("vote_lanes", machine.input(values, "in"), out)
    machine.assert_clean()
    low = sum(1 << lane for lane in range(20) if lane % 3 == 0)
    assert out[0].tolist() == [low] * 20 + [0xFFF00000 - (1 << 32)] * 12  # as signed integers
    assert out[1].tolist() == [1] * 32 and out[2].tolist() == [0] * 20 + [1] * 12


def run_probe(kernel, wrong, seed, **settings):
    """The machine after one launch of a kernel of wrong_*.cu, and its output."""
    machine = Machine(compiled(source_of(kernel)), seed=seed, resident=1 + seed % 3, most_accesses=100_000, **settings)
    count = machine.writable(torch.zeros(1, dtype=torch.int32), "count")
    given, out = machine.input(torch.arange(256.0), "in"), machine.uninitialised(torch.empty(256), "out")
    shared = 256 if kernel == "dynamic_behind" else 1024
    machine.call(f"{kernel}_probe", given, out, count, 256, int(wrong), shared)
    return machine, out


@pytest.mark.parametrize("kernel", WRONG_KERNELS)
def test_wrong_kernel_is_caught_by_its_check_at_its_line(kernel):
    source = source_of(kernel)
    text = source.read_text()
    lines = [number for number, line in enumerate(text.splitlines(), 1) if line.endswith(f"// caught: {kernel}")]
    blocks = int(re.search(rf"PROBE\({kernel}, (\d+)\)", text)[1])
    for seed in range(4):
        machine, _ = run_probe(kernel, True, seed)
        first = machine.findings[0]
        assert (first.check, first.file) == (WRONG_KERNELS[kernel], source.name), str(first)
        assert first.line in lines, str(first)
        assert 0 <= first.block[0] < blocks and 0 <= first.thread[0] < 64


@pytest.mark.parametrize("kernel", WRONG_KERNELS)
def test_right_kernel_runs_clean_in_any_order(kernel):
    outputs = []
    for seed in range(4):
        machine, out = run_probe(kernel, False, seed, traffic=seed == 3)
        machine.assert_clean()
        outputs.append(out)
    assert all(torch.equal(out, outputs[0]) or torch.equal(out.isnan(), outputs[0].isnan()) for out in outputs)


def test_every_check_that_a_kernel_can_fail_has_a_wrong_kernel():
    assert set(CHECKS) - set(WRONG_KERNELS.values()) == {"shared memory limit", "launch limit"}  # next tests


@pytest.mark.parametrize("arch", SHARED_LIMITS)
def test_shared_memory_beyond_the_architecture_is_refused(arch):
    for excess in (0, 1):
        machine = Machine(compiled(ACCESSES), arch=arch)
        buffers = [machine.writable(torch.zeros(256), name) for name in ("in", "out")]
        count = machine.writable(torch.zeros(1, dtype=torch.int32), "count")
        refused = machine.call("copy_for_others_probe", *buffers, count, 256, 0, SHARED_LIMITS[arch] + excess)
        assert bool(refused) == bool(excess)
        assert [f.check for f in machine.findings] == ["shared memory limit"] * excess


def test_static_and_dynamic_shared_memory_are_counted_together():
    machine = Machine(compiled(ACCESSES))
    buffers = [machine.writable(torch.zeros(256), name) for name in ("in", "out")]
    count = machine.writable(torch.zeros(1, dtype=torch.int32), "count")
    machine.call("static_behind_probe", *buffers, count, 256, 0, SHARED_LIMITS[80] - 259)
    assert [f.check for f in machine.findings] == ["shared memory limit"]
    assert machine.counters.shared_bytes == SHARED_LIMITS[80] + 1


@pytest.mark.parametrize(("blocks", "threads"), [(1, 1025), (1, 0), (65536, 32)])
def test_launch_beyond_the_limits_is_refused(layouts, blocks, threads):
    machine = Machine(layouts)
    assert machine.call("launch_only", machine.writable(torch.zeros(96), "out"), blocks, threads, 0) != 0
    assert [f.check for f in machine.findings] == ["launch limit"]


def test_seed_chooses_the_order_and_repeats_it():
    def first(seed):
        machine, _ = run_probe("blocks_write_one", True, seed)
        return str(machine.findings[0])

    assert [first(seed) for seed in range(6)] == [first(seed) for seed in range(6)]
    assert len({first(seed) for seed in range(12)}) > 3


@pytest.mark.parametrize(("stride", "conflicts", "sectors"), [(1, 0, 4), (2, 1, 8), (8, 7, 32), (31, 0, 32), (0, 0, 1)])
def test_traffic_counts_conflicts_and_sectors_of_a_stride(layouts, stride, conflicts, sectors):
    """Lanes `stride` words apart: gcd(stride, 32) of them share a bank; 128 · stride bytes hold them."""
    machine = Machine(layouts, traffic=True)
    given = machine.input(torch.ones(32 * 32), "in")
    machine.call("read_strided", given, machine.uninitialised(torch.empty(32), "out"), stride)
    machine.assert_clean()
    source = LAYOUTS.read_text().splitlines()
    by_line = {t.lines[0].partition(":")[2]: t for t in machine.traffic}
    at = {name: by_line[str(number)] for number, text in enumerate(source, 1)
          for name in re.findall(r"// line: (\w+)", text)}  # fmt: skip
    assert (at["fill"].shared_requests, at["fill"].conflicts) == (32, 0)
    assert (at["shared"].shared_requests, at["shared"].conflicts) == (1, conflicts)
    assert (at["global"].global_requests, at["global"].sectors) == (1, sectors)
    assert at["global"].fewest_sectors == 4


@pytest.mark.parametrize(("pitch", "conflicts"), [(16, 0), (128, 28), (144, 0), (256, 28)])
def test_traffic_counts_conflicts_of_ldmatrix(layouts, pitch, conflicts):
    """Eight rows go out together: rows of 128 bytes one below the other meet in the same four banks."""
    machine = Machine(layouts, traffic=True)
    rows, order = torch.zeros(32, 8, dtype=torch.int16), torch.arange(32, dtype=torch.int32)
    registers = machine.uninitialised(torch.empty(32, 4, dtype=torch.int32), "registers")
    machine.call("load_matrices", machine.input(rows, "rows"), machine.input(order, "order"), registers, 4, 0, pitch)
    machine.assert_clean()
    rows_read = [t for t in machine.traffic if t.lines[0].startswith("mma.cuh")]
    assert [(t.shared_requests, t.conflicts) for t in rows_read] == [(1, conflicts)]
