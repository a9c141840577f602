"""The self-check of the Triton kernels: when it runs, what it records, and that it tells right kernels from wrong ones.

Cards are faked. The check itself runs in a process of its own, under Triton's interpreter: `selfcheck_cases.py`.
"""

import pytest
import torch
from faked_cards import DKV, KIND, files, forget, table_tile
from interpreted import run_cases

from prefix_fast import selfcheck
from prefix_fast.backends import triton_config, triton_vetting
from prefix_fast.backends.triton_config import TABLE, safe_tiles, tiles_for
from prefix_fast.backends.triton_vetting import Configuration, Kind
from prefix_fast.testing import Case

pytest.importorskip("triton")
pytestmark = pytest.mark.usefixtures("card")
CUDA = torch.device("cuda", 0)


@pytest.fixture
def checked(monkeypatch):
    """The configurations that are checked, each of which passes."""
    found = []

    def check(device, configuration, tile):
        found.append((device, configuration, tile))

    monkeypatch.setattr(selfcheck, "_failure", check)
    return found


def test_only_what_has_no_verdict_is_checked(checked, tmp_path):
    wanted = selfcheck.configurations([KIND])
    seen = []
    assert set(selfcheck.run("cuda:0", wanted, progress=seen.append)) == set(wanted) == set(seen)
    assert [(entry[1], entry[2]) for entry in checked] == [(c, table_tile(c.kernel)) for c in wanted]
    assert len(files(tmp_path)) == len(wanted)
    forget()
    checked.clear()
    assert set(selfcheck.run("cuda:0", wanted)) == set(wanted) and checked == []
    selfcheck.run("cuda:0", wanted, renew=True)
    assert len(checked) == len(wanted)


def test_the_safe_tile_is_checked_where_the_table_fails(monkeypatch):
    tried = []

    def check(device, configuration, tile):
        tried.append(tile)
        return f"{tile.queries} is wrong"

    monkeypatch.setattr(selfcheck, "_failure", check)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    verdict = selfcheck.run("cuda:0", [DKV])[DKV]
    assert tried == [table_tile(), safe_tiles(64).dkv]
    assert verdict.refused and verdict.safe_failure == "32 is wrong"
    single = Configuration("split", Kind(256, torch.float32, "ieee", False))
    tried.clear()
    assert selfcheck.run("cuda:0", [single])[single].refused  # its tile of the table is the safe one
    assert tried == [safe_tiles(256).split]


def test_a_kernel_that_breaks_the_device_is_recorded_before_the_error(monkeypatch):
    def lost(device):
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(selfcheck, "_failure", lambda *_: "RuntimeError: illegal memory access")
    monkeypatch.setattr(torch.cuda, "synchronize", lost)
    with pytest.raises(RuntimeError, match=r"dkv-D64-bf16 to leave the device usable.*start this process again"):
        selfcheck.run("cuda:0", [DKV])
    forget()
    verdict = triton_vetting.verdict_of(0, DKV)
    assert "illegal memory access" in verdict.failure and not verdict.refused


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), OSError(28, "No space left")])
def test_a_check_without_memory_or_disk_leaves_the_configuration_unchecked(monkeypatch, tmp_path, error):
    def full(*_):
        raise error

    monkeypatch.setattr(selfcheck, "_failure", full)
    assert selfcheck.run("cuda:0", [DKV]) == {}
    assert files(tmp_path) == [] and triton_vetting.tiles_of_call(0, KIND).dkv == safe_tiles(64).dkv


def test_a_model_has_its_own_kind_checked_once(checked, caplog):
    selfcheck.vet(CUDA, "auto", 80, torch.bfloat16, torch.float32)
    expected = selfcheck.configurations([Kind(128, torch.bfloat16, "ieee", True)])
    assert [entry[1] for entry in checked] == expected
    assert "Checking the Triton kernels for D128-bf16-fp32_prefix on Card 0" in caplog.text
    selfcheck.vet(CUDA, "auto", 80, torch.bfloat16, torch.float32)
    assert len(checked) == len(expected)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_nothing_is_checked_for_another_backend_or_device(checked, backend):
    selfcheck.vet(CUDA, backend, 64, torch.float32, torch.float32)
    selfcheck.vet(CUDA, "auto", 64, torch.float64, torch.float64)
    selfcheck.vet(CUDA, "triton", 320, torch.float32, torch.float32)
    selfcheck.vet(torch.device("cpu"), "auto", 64, torch.float32, torch.float32)
    assert checked == []


def test_nothing_is_checked_in_a_traced_or_captured_call(checked, monkeypatch):
    from torch._subclasses.fake_tensor import FakeTensorMode

    def attempt():
        selfcheck.vet(CUDA, "auto", 64, torch.bfloat16, torch.bfloat16)
        with pytest.raises(RuntimeError, match="traced or captured"):
            selfcheck.run(CUDA, [DKV])

    with monkeypatch.context() as patch:
        patch.setattr(torch.compiler, "is_compiling", lambda: True)
        attempt()
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        attempt()
    with FakeTensorMode():
        attempt()
    assert checked == []
    selfcheck.vet(CUDA, "auto", 64, torch.bfloat16, torch.bfloat16)  # the next call makes up for it
    assert len(checked) == len(selfcheck.configurations([KIND]))


def test_autocast_decides_what_a_model_needs(checked, monkeypatch):
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: True)
    monkeypatch.setattr(torch, "get_autocast_dtype", lambda device: torch.float16)
    selfcheck.vet(CUDA, "auto", 64, torch.bfloat16, torch.float32)
    assert {entry[1].kind for entry in checked} == {Kind(64, torch.float16, "ieee", False)}


@pytest.mark.parametrize(
    ("dtype", "compute_dtype", "expected"),
    [
        (torch.float32, None, (torch.float32, torch.float32)),
        (torch.bfloat16, None, (torch.bfloat16, torch.float32)),
        (torch.float32, torch.bfloat16, (torch.bfloat16, torch.bfloat16)),
    ],
)
def test_patch_vets_what_its_model_runs_and_each_call_what_it_is(monkeypatch, any_half, dtype, compute_dtype, expected):
    from transformers import GPT2Config, GPT2LMHeadModel

    from prefix_fast import patch

    vetted = []
    monkeypatch.setattr(selfcheck, "vet", lambda *facts: vetted.append(facts))
    model = GPT2LMHeadModel(GPT2Config(n_layer=2, n_head=2, n_embd=32, n_positions=64, vocab_size=50)).to(dtype)
    patch(model, 4, backend="reference", compute_dtype=compute_dtype)
    assert vetted == [(torch.device("cpu"), "reference", 16, *expected)]
    vetted.clear()
    model(input_ids=torch.arange(8)[None])
    assert len(vetted) == 2 and all(facts[:3] == (torch.device("cpu"), "reference", 16) for facts in vetted)


def test_a_check_and_its_caller_leave_each_other_alone(monkeypatch):
    """Also within a forward under autocast, without gradients, or whose saved tensors are counted (checkpointing)."""
    ran, saved = [], []

    def run_kernel(problem, true, trial):
        ran.append(trial)
        assert torch.get_float32_matmul_precision() == "medium" and not torch.are_deterministic_algorithms_enabled()
        assert (
            torch.is_grad_enabled() and not torch.is_inference_mode_enabled() and torch.zeros(()).device.type == "cpu"
        )
        assert (problem.query @ problem.query.transpose(-1, -2)).dtype == torch.float32
        torch.rand(3)
        return {"out": true["out"], "lse": true["lse"]}

    monkeypatch.setattr(selfcheck, "_CHECKED", {"forward": (run_kernel, lambda *_: [Case(dropout_p=0.5)])})
    configuration = Configuration("forward", Kind(16, torch.float32, "tf32", False))
    torch.use_deterministic_algorithms(True)
    before = torch.get_rng_state()
    hooks = torch.autograd.graph.saved_tensors_hooks(saved.append, lambda packed: packed)
    for state in (torch.no_grad(), torch.inference_mode(), torch.autocast("cpu", torch.bfloat16), torch.device("meta")):
        with state, hooks:
            assert selfcheck.run("cpu", [configuration], renew=True)[configuration].failure is None
    assert len(ran) == 4 and saved == []
    assert torch.get_float32_matmul_precision() == "highest" and torch.are_deterministic_algorithms_enabled()
    assert torch.equal(torch.get_rng_state(), before)


def tiles_of_the_table():
    """Every tile of a kernel that is checked, with a padded head dim that it serves."""
    tiles = {
        (kernel, block_d, getattr(table, kernel))
        for architecture in (*TABLE, "interpreter")
        for block_d in selfcheck.BLOCKS
        for table in (tiles_for(triton_config.Device(architecture, 8), block_d, torch.bfloat16), safe_tiles(block_d))
        for kernel in selfcheck._CHECKED
    }
    return sorted(tiles)


@pytest.mark.parametrize("kernel", ["forward", "few", "dq", "dkv"])
def test_checks_cover_several_tiles_each_way_and_ragged_ends(kernel):
    for name, block_d, tile in tiles_of_the_table():
        if name != kernel:
            continue
        cases = selfcheck._CHECKED[kernel][1](tile, block_d)
        for case in cases:
            problem = selfcheck.make_problem(case, KIND, "cpu")
            lengths = problem.cu_seqlens_q.diff() if case.packed else torch.tensor([problem.query.shape[2]])
            assert lengths.max() > tile.queries and (lengths % tile.queries).any()
            assert case.packed or lengths.max() > 2 * max(tile.queries, tile.keys)
            assert all(s.key.shape[2] > 2 * tile.keys and s.key.shape[2] % tile.keys for s in problem.sets)
            assert 1 << (case.D - 1).bit_length() == block_d
        masked = selfcheck.make_problem(cases[0], KIND, "cpu")
        assert sorted(masked.sets[0].ids.tolist()) == [-1, 0, 0, 1] and masked.sets[0].lengths.min() > tile.keys
        assert masked.sets[0].lengths.max() == masked.sets[0].key.shape[2] and not masked.key_mask.all(dim=1).any()
        assert (masked.key_mask.sum(dim=1) > tile.keys).all()
        assert any(case.Hkv < case.H for case in cases) and any(block_d % case.D for case in cases)
        assert any(case.key_mask == "none" for case in cases) and any(case.dropout_p for case in cases)


@pytest.mark.parametrize("kernel", selfcheck._CHECKED)
def test_checks_include_a_float32_bias_of_all_keys_beside_half_precision(kernel):
    cases = selfcheck._CHECKED[kernel][1](getattr(safe_tiles(64), kernel), 64)
    biased = [problem for case in cases if (problem := selfcheck.make_problem(case, KIND, "cpu")).attn_bias is not None]
    assert biased
    for problem in biased:
        assert problem.query.dtype == torch.bfloat16 and problem.attn_bias.dtype == torch.float32
        assert [s.bias.dtype for s in problem.sets] == [torch.float32]


def test_checks_of_few_queries_cover_several_tiles_of_readers_and_each_block_of_queries():
    for name, block_d, tile in tiles_of_the_table():
        if name != "split":
            continue
        cases = selfcheck._CHECKED[name][1](tile, block_d)
        assert all(
            min(case.Tk, case.P) > 2 * tile.keys and case.Tk % tile.keys and case.P % tile.keys for case in cases
        )
        folded = [case.B // case.N * case.Tq * case.H // case.Hkv for case in cases]
        assert folded[0] > 2 * tile.queries and folded[0] % tile.queries
        assert folded[1] <= 16 < folded[2] <= 32  # the kernel's block is what holds them, if the tile is no smaller


@pytest.mark.parametrize("chosen", ["not slow", pytest.param("slow", marks=pytest.mark.slow)])
def test_the_self_check_tells_right_kernels_from_wrong_ones(root, chosen):
    run_cases(root, "selfcheck_cases.py", chosen)
