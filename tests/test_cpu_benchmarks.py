"""The benchmarks' rivals compute what ours does; comparisons time in turn; reports say what was measured."""

import json
from types import SimpleNamespace

import compare as comparing
import plot
import pytest
import rivals
import torch
from compare import Contender, Row, compare, parity_error, table
from limits import Limits, limits_of, rates_line

from prefix_fast import prefix_attention
from prefix_fast.backends import native_cost
from prefix_fast.backends.shapes import Shape
from prefix_fast.speed import concatenation_attention, visible_keys

MACHINE = native_cost.Machine("avx512", 2, 2e11, 0.0, 1e10, ((1 << 20, 1e11), (1 << 27, 2e10)), 2e-5, 1e-5)


def inputs(B: int, Tq: int, Tk: int, P: int, H: int = 3, Hkv: int = 3, dtype=torch.float32) -> list[torch.Tensor]:
    sizes = [(B, H, Tq), (B, Hkv, Tk), (B, Hkv, Tk), (1, Hkv, P), (1, Hkv, P)]
    return [torch.randn(*size, 16).to(dtype).requires_grad_() for size in sizes]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(("B", "Tq", "Tk", "P"), [(2, 5, 5, 7), (3, 1, 9, 4), (1, 17, 17, 33)])
def test_rivals_give_the_results_and_gradients_of_the_oracle(B, Tq, Tk, P, dtype) -> None:
    tensors = inputs(B, Tq, Tk, P, dtype=dtype)
    mask = visible_keys(tensors[0], tensors[1], tensors[3])
    expected = prefix_attention(*tensors, backend="reference")
    grad_out = torch.randn_like(expected)
    grads = torch.autograd.grad(expected, tensors, grad_out)
    functions = [rivals.merge, lambda *args: concatenation_attention(*args, mask)]
    for function in [*functions, *([rivals.gemm_merge] if Tq == 1 else [])]:
        out = function(*tensors)
        assert out.dtype == dtype
        found = [out]
        if function is not rivals.gemm_merge:
            found += torch.autograd.grad(out, tensors, grad_out)
        for theirs, truth in zip(found, (expected, *grads), strict=False):
            error = (theirs.double() - truth.double()).abs().max() / truth.double().abs().max()
            assert error < (1e-5 if dtype == torch.float32 else 3e-2)


def test_concatenation_serves_grouped_heads_and_drops_weights() -> None:
    tensors = inputs(2, 6, 6, 5, H=4, Hkv=2)
    mask = visible_keys(tensors[0], tensors[1], tensors[3])
    expected = prefix_attention(*tensors, backend="reference")
    torch.testing.assert_close(concatenation_attention(*tensors, mask), expected, rtol=1e-5, atol=1e-5)
    assert not torch.equal(concatenation_attention(*tensors, mask, dropout_p=0.5), expected)


class FakeBenchmark:
    """As pytest-benchmark's fixture, with times that were decided before."""

    def __init__(self) -> None:
        self.group, self.extra_info, self.stats = "", {}, SimpleNamespace(stats=SimpleNamespace(data=[0.5, 0.25]))

    def pedantic(self, run, setup, rounds, iterations) -> None:
        for _ in range(rounds):
            setup()
            run()


def test_a_comparison_checks_results_then_times_in_turn(monkeypatch) -> None:
    order = []

    def contender(name: str, rounds: int | None = None) -> Contender:
        def result(kind: str):
            order.append(kind + name)
            return (torch.ones(2),)

        return Contender(name, lambda: result(""), rounds, check=lambda: result("check "))

    peaks = iter((3.0, 5.0))
    limits = Limits(10.0, 4.0, 0.2, lambda: order.append("peak") or next(peaks))
    benchmark = FakeBenchmark()
    rows = compare(
        benchmark,
        group="operator",
        case="one",
        ours=contender("ours"),
        rivals=[contender("first"), contender("second", 1)],
        rounds=2,
        tolerance=0.0,
        headlines=["first"],
        limits=limits,
    )
    checks = ["check ours", "check first", "check second"]
    assert order == [*checks, "peak", "first", "second", "ours", "peak", "first", "ours"]
    assert [row.headline for row in rows] == [True, False]
    assert rows[0].ours_seconds == 0.25 and rows[0].peak == 5.0
    assert rows[0].of_peak == pytest.approx(10.0 / 0.25 / 5.0)
    stored = json.loads(json.dumps(benchmark.extra_info["rows"]))
    assert [Row.from_dict(fields) for fields in stored] == rows
    assert stored[0]["ratio"] == rows[0].ratio and stored[0]["of_peak"] == rows[0].of_peak


def test_results_that_differ_stop_a_comparison() -> None:
    with pytest.raises(AssertionError, match="result 1 differs from rival by 5"):
        parity_error([torch.ones(2), torch.ones(2)], [torch.ones(2), torch.full((2,), 2.0)], 0.1, "rival")
    with pytest.raises(AssertionError, match="rival returns 2 results, ours 1"):
        parity_error([torch.ones(2)], [torch.ones(2)] * 2, 0.1, "rival")


def rows() -> list[Row]:
    limited = {"flop": 4e9, "bytes": 1e7, "predicted_seconds": 0.03, "peak": 2e11}
    return [
        Row("operator", "forward, B8", "ours", "a rival", 0.025, 0.05, 1e-6, True, **limited),
        Row("operator", "forward, B8", "ours", "another", 0.025, 0.1, 2e-6, False, **limited),
        Row("operator", "forward, B8 bfloat16", "ours", "a rival", 0.02, 0.1, 2e-3, False, **limited),
        Row("training step", "GPT-2", "ours", "PEFT", 2.0, 3.0, None, True, {"peak": "1 GiB"}),
    ]


def test_table_has_rate_part_of_peak_and_prediction_once_for_a_case() -> None:
    header, first, second, _, step = table(rows())
    assert header.split("  ")[0] == "case"
    for word in ("25 ms", "160", "80%", "30 ms (+20%)", "a rival", "50 ms", "2.00×", "1e-06"):
        assert word in first
    assert second.split() == ["another", "100", "ms", "4.00×", "2e-06"]
    assert " ".join(step.split()) == "training step · GPT-2 2 s PEFT 3 s 1.50× another task, peak 1 GiB"
    starts = [line.index(name) for line, name in ((first, "a rival"), (second, "another"), (step, "PEFT"))]
    assert len(set(starts)) == 1


def test_limits_are_the_sums_of_the_passes_that_are_timed(monkeypatch) -> None:
    monkeypatch.setattr("limits.machine_rates", lambda: MACHINE)
    shape = Shape(2, 3, 3, 4, 4, 16, 4, ((1, 5),))
    pairs = 3 * 2 * (4 * 5 + 10)
    passes = [limits_of(shape, torch.float32, forward=f, backward=b) for f, b in ((1, 0), (0, 1), (1, 1))]
    assert [limits.flop for limits in passes] == [4 * 16 * pairs, 10 * 16 * pairs, 14 * 16 * pairs]
    for name in ("bytes", "predicted_seconds"):
        forward, backward, both = (getattr(limits, name) for limits in passes)
        assert min(forward, backward) > 0 and both == pytest.approx(forward + backward)
    numbers = 2 * 3 * 16 * (2 * 4 + 2 * 4) + 2 * 3 * 16 * 5  # q, out, k, v; the prefix
    assert passes[0].bytes == 4 * numbers
    assert 1e8 < passes[0].peak() < 1e13


def test_pictures_are_drawn_from_rows_and_from_their_json(tmp_path) -> None:
    pytest.importorskip("matplotlib")
    named = {"level": "avx512", "float32 multiply-adds": 200.0, "float32 GEMM": 180.0}
    named |= {"bytes from 4 MiB": 90.0, "bytes from 128 MiB": 20.0}
    assert "float32 GEMM 180" in rates_line(named) and "level avx512" in rates_line(named)
    data = {
        "benchmarks": [{"extra_info": {"rows": [row.as_dict() for row in rows()]}}, {"extra_info": {}}],
        "machine_info": {"prefix_fast": {**comparing.machine(), "rates": named}},
    }
    results = tmp_path / "results.json"
    results.write_text(json.dumps(data), "utf-8")
    plot.main(str(results), str(tmp_path / "ratios.png"), str(tmp_path / "roofline.png"))
    pictures = [(tmp_path / f"{name}.png").read_bytes() for name in ("ratios", "roofline")]
    assert all(picture.startswith(b"\x89PNG") and len(picture) > 5000 for picture in pictures)
    assert pictures[0] != pictures[1]
