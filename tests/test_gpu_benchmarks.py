"""The GPU benchmarks' rivals compute what ours does; their report says what was measured and what was not."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend
from torch.nn.attention.flex_attention import create_mask
from torch.nn.functional import scaled_dot_product_attention

from prefix_fast import prefix_attention
from prefix_fast.backends.triton_cost import Shape
from prefix_fast.prediction import label

# Compiled it has no backward on a CPU; its mathematics are the same.
pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning")
FOLDER = Path(__file__).resolve().parent.parent / "benchmarks" / "gpu"


@pytest.fixture(scope="module")
def gpu():
    """The modules of benchmarks/gpu, which its program finds beside itself."""
    import importlib

    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(FOLDER))
        names = ("contenders", "report", "timing")
        modules = {name: importlib.import_module(name) for name in names}
        spec = importlib.util.spec_from_file_location("bench_gpu", FOLDER / "__main__.py")
        modules["program"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(modules["program"])
        yield type("Modules", (), modules)
        for name in names:
            sys.modules.pop(name)


def shape(B=3, H=4, Hkv=2, Tq=9, Tk=9, P=7, D=16) -> Shape:
    return Shape(B, H, Hkv, Tq, Tk, D, 2, ((1, P),))


TRAINING = [shape(), shape(H=2, P=1, Tq=5, Tk=5), shape(B=1, Hkv=4, P=130, Tq=3, Tk=3)]
DECODING = [shape(Tq=1, Tk=20), shape(Tq=4, Tk=20, P=33), shape(B=1, Tq=1, Tk=16, P=16)]


def truth(contender, grad_out: Tensor | None) -> list[Tensor]:
    return contender.comparable(contender.results(grad_out))


def dense_flex(query: Tensor, key: Tensor, value: Tensor, block_mask, enable_gqa: bool) -> Tensor:
    """What flex computes, with its mask written out: on a CPU flex itself has no backward."""
    mask = create_mask(block_mask.mask_mod, None, None, query.shape[2], key.shape[2], device="cpu")
    return scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=enable_gqa)


@pytest.mark.parametrize("given", TRAINING, ids=label)
@pytest.mark.parametrize("rival", ["concatenation", "flex_concatenation", "packed_flex"])
def test_training_rivals_give_the_results_of_the_oracle(gpu, rival: str, given: Shape) -> None:
    leaves = gpu.contenders.make_inputs(given, "cpu", torch.float32, grad=True)
    grad_out = torch.randn_like(leaves[0])
    expected = truth(gpu.contenders.ours(leaves, "reference"), grad_out)
    contender = getattr(gpu.contenders, rival)(leaves, SDPBackend.MATH if rival == "concatenation" else dense_flex)
    found = truth(contender, contender.given(grad_out))
    assert len(found) == 6
    for mine, theirs in zip(expected, found, strict=True):
        torch.testing.assert_close(theirs, mine, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("given", TRAINING, ids=label)
@pytest.mark.parametrize("rival", ["flex_concatenation", "packed_flex"])
def test_flex_itself_gives_the_output_of_the_oracle(gpu, rival: str, given: Shape) -> None:
    leaves = gpu.contenders.make_inputs(given, "cpu", torch.float32, grad=False)
    (expected,) = truth(gpu.contenders.ours(leaves, "reference"), None)
    (found,) = truth(getattr(gpu.contenders, rival)(leaves), None)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("given", DECODING, ids=label)
@pytest.mark.parametrize("rival", ["concatenation", "cached", "flex_concatenation"])
def test_decoding_rivals_give_the_results_of_the_oracle(gpu, rival: str, given: Shape) -> None:
    leaves = gpu.contenders.make_inputs(given, "cpu", torch.float32, grad=False)
    (expected,) = truth(gpu.contenders.ours(leaves, "reference"), None)
    arguments = () if rival == "flex_concatenation" else (SDPBackend.MATH,)
    (found,) = truth(getattr(gpu.contenders, rival)(leaves, *arguments), None)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_masks_show_the_prefix_and_the_rows_own_tokens_before(gpu) -> None:
    P, T, B = 3, 4, 2
    keys, queries = torch.arange(P + B * T), torch.arange(B * T)[:, None]
    packed = gpu.contenders.packed_mask(P, T)(None, None, queries, keys)
    for query in range(B * T):
        row, position = divmod(query, T)
        own = [P + row * T + j for j in range(position + 1)]
        assert packed[query].nonzero().flatten().tolist() == [0, 1, 2, *own]
    alone = gpu.contenders.prefix_mask(P, 2)(None, None, torch.arange(2)[:, None], torch.arange(P + 4))
    assert alone.sum(1).tolist() == [P + 3, P + 4]


def test_pages_hold_prefix_and_rows_where_their_table_says(gpu) -> None:
    """Read by the meaning of FlashInfer's table: the attention over those keys is the oracle's."""
    given = shape(B=2, Tq=1, Tk=18, P=33)
    leaves = gpu.contenders.make_inputs(given, "cpu", torch.float32, grad=False)
    cache, tables = gpu.contenders.pages_of(leaves)

    def read(table, number: int) -> tuple[Tensor, Tensor]:
        first, last = table["indptr"][number : number + 2].tolist()
        pages = cache[table["indices"][first:last].long()]  # [pages, 2, PAGE, Hkv, D]
        tokens = (last - first - 1) * gpu.contenders.PAGE + int(table["last"][number])
        return tuple(pages[:, i].flatten(0, 1)[:tokens].transpose(0, 1)[None] for i in range(2))

    (expected,) = truth(gpu.contenders.ours(leaves, "reference"), None)
    prefix = read(tables[0], 0)
    for row in range(2):
        found = prefix_attention(leaves[0][row : row + 1], *read(tables[1], row), *prefix, backend="reference")
        torch.testing.assert_close(found, expected[row : row + 1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backward", [False, True])
def test_a_comparison_times_what_agrees_and_lists_what_does_not(gpu, monkeypatch, backward: bool) -> None:
    contenders = gpu.contenders

    def rivals(given, leaves):
        wrong = contenders.Contender(lambda: contenders.ours(leaves, "reference").forward() * 1.2, leaves)
        return {
            "concatenation + SDPA": lambda: contenders.concatenation(leaves, SDPBackend.MATH),
            "wrong": lambda: wrong,
            "limited": lambda: (_ for _ in ()).throw(NotImplementedError("no such | head dim")),
        }

    monkeypatch.setattr(gpu.program, "rivals_of", rivals)
    results = gpu.program.compare(shape(), backward, "cpu", "reference", 3)
    by_name = {result.contender: result for result in results}
    assert by_name["prefix_attention"].ours and by_name["prefix_attention"].ratio == 1
    good = by_name["concatenation + SDPA"]
    assert good.error is None and good.difference <= 5e-2 and good.fastest_seconds <= good.median_seconds
    assert good.ratio == pytest.approx(good.median_seconds / by_name["prefix_attention"].median_seconds)
    assert "differs from ours" in by_name["wrong"].error and by_name["wrong"].median_seconds is None
    assert by_name["limited"].error == "NotImplementedError: no such | head dim"
    report = json.loads(json.dumps(gpu.report.as_json(gpu.report.machine("cpu"), results)))
    assert report["machine"]["torch"] == torch.__version__ and len(report["results"]) == 4
    lines = gpu.report.as_markdown(results).splitlines()
    assert len({line.count("|") for line in lines}) == 1 and len(lines) == 6
    assert any("**prefix_attention**" in line for line in lines) and any("no such / head dim" in line for line in lines)


def test_rounds_alternate_after_a_warm_up(gpu) -> None:
    order = []
    runs = [lambda: order.append("a"), lambda: order.append("b")]
    seconds = gpu.timing.interleaved_seconds(runs, 3, "cpu")
    assert order == ["a", "b"] * 4 and [len(times) for times in seconds] == [3, 3]
    assert all(math.isfinite(time) and time >= 0 for times in seconds for time in times)


def test_parts_of_a_run_cover_every_shape_once(gpu) -> None:
    def chosen(**options):
        return gpu.program.chosen(type("Options", (), {"only": "", "part": "0/1", **options}))

    every = chosen()
    assert sorted(map(str, every)) == sorted(str(one) for i in range(3) for one in chosen(part=f"{i}/3"))
    assert {backward for _, backward in every} == {False, True} and len(set(map(str, every))) == len(every)
    assert all(" P8192" in gpu.program.label(given) for given, _ in chosen(only="P8192")) and chosen(only="P8192")


def test_without_a_device_it_says_so_and_exits_with_2(root: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a device")
    done = subprocess.run([sys.executable, FOLDER], cwd=root, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == "bench-gpu: no CUDA or ROCm device is visible to torch, so nothing was run\n"
