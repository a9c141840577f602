"""What the C++ kernels read and write: strides, poison beyond what is valid, wanted gradients alone, huge offsets."""

from dataclasses import replace

import pytest
import torch
from native_inputs import ISAS, assert_same_bits, differentiate, run

from prefix_fast.testing import Case, float_tensors, make_problem, with_float_tensors

SHAPES = [
    Case(B=4, H=4, Hkv=2, Tq=70, Tk=70, P=70, D=32, N=2, ids="random"),
    Case(B=20, H=4, Hkv=2, Tq=1, Tk=70, P=200, D=17, N=2, ids="random"),
]


@pytest.fixture(params=ISAS)
def isa(request, monkeypatch):
    monkeypatch.setenv("PREFIX_FAST_CPU_ISA", request.param)
    return request.param


def layouts(tensor):
    """The same values transposed in memory, as a slice of something larger full of NaN, and expanded where equal."""
    yield tensor.transpose(1, 2).contiguous().transpose(1, 2)
    yield tensor.transpose(0, 2).contiguous().transpose(0, 2)
    larger = torch.full([size + 3 for size in tensor.shape], torch.nan, dtype=tensor.dtype)
    view = larger[tuple(slice(2, 2 + size) for size in tensor.shape)]
    yield view.copy_(tensor)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize("case", SHAPES, ids=str)
def test_strides_change_no_bits(case, dtype, isa):
    problem = make_problem(replace(case, dtype=dtype))
    expected = run(problem)
    named = float_tensors(problem)
    for index in range(3):
        copies = {name: list(layouts(tensor))[index] for name, tensor in named.items()}
        assert_same_bits(run(with_float_tensors(problem, copies)), expected)


@pytest.mark.parametrize("case", SHAPES, ids=str)
def test_expanded_tensors_equal_their_copies(case, isa):
    problem = make_problem(case)
    named = {name: tensor[:1].expand_as(tensor) for name, tensor in float_tensors(problem).items()}
    copies = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in named.items()}
    assert_same_bits(run(with_float_tensors(problem, named)), run(with_float_tensors(problem, copies)))


@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf], ids=str)
@pytest.mark.parametrize("case", SHAPES, ids=str)
@pytest.mark.parametrize("mask", ["left", "right", "scattered"])
def test_what_is_not_valid_does_not_leak(case, mask, poison, isa):
    """Keys and values past lengths and under the mask: same bits as with zeros there, and gradients exactly 0."""
    problem = make_problem(replace(case, lengths="random", key_mask=mask))
    named = float_tensors(problem)
    past = torch.arange(case.P) >= problem.sets[0].lengths[:, None]
    hidden = {"key": ~problem.key_mask, "segment0.key": past}
    hidden |= {"value": hidden["key"], "segment0.value": past}

    def filled(value):
        tensors = {n: t.masked_fill(hidden[n][:, None, :, None], value) if n in hidden else t for n, t in named.items()}
        return run(with_float_tensors(problem, tensors))

    found = filled(poison)
    assert_same_bits(found, filled(0.0))
    for name, where in hidden.items():
        grad = found[f"grad.{name}"]
        assert grad.isfinite().all()
        assert not grad[where[:, None, :, None].expand_as(grad)].any()


def test_segments_that_nobody_reads_get_zeros(isa):
    for dtype in (torch.float32, torch.bfloat16):
        problem = make_problem(Case(B=3, N=4, P=20, D=16, ids="random", dtype=dtype))
        ids = torch.tensor([2, -1, 2])
        results = run(replace(problem, sets=(replace(problem.sets[0], ids=ids),)))
        for side in ("key", "value"):
            grad = results[f"grad.segment0.{side}"]
            assert not grad[[0, 1, 3]].any()
            assert grad[2].any()


@pytest.mark.parametrize(
    "case",
    [Case(B=0), Case(Tq=0), Case(Tk=0), Case(P=0), Case(Tk=0, P=0), Case(N=0, ids="random"), Case(num_sets=0),
     Case(B=20, Tq=1, Tk=0, P=0), Case(B=20, Tq=1, Tk=3, P=0), Case(B=3, packed=True, Tq=0, Tk=4)],
    ids=str,
)  # fmt: skip
def test_empty_cases_write_everything(case, isa):
    results = run(make_problem(case))
    assert not any(tensor.isnan().any() for tensor in results.values())


def test_queries_that_see_nothing(isa):
    """Zero out and gradients, lse -inf, whether by the causal bound, the mask or the bias."""
    for tokens in (1, 2, 20):
        problem = make_problem(Case(B=9, Tq=tokens, Tk=20, P=0, D=16, query_offset="int"))
        blind = [
            replace(problem, query_offset=-tokens - 1),
            replace(problem, key_mask=torch.zeros(9, 20, dtype=torch.bool)),
            replace(problem, attn_bias=torch.full((1, 1, 1, 1), -torch.inf).expand(9, 4, tokens, 20)),
        ]
        for case in blind:
            results = run(case)
            assert (results["lse"] == -torch.inf).all()
            assert not any(tensor.any() for name, tensor in results.items() if name != "lse")


@pytest.mark.parametrize("case", SHAPES, ids=str)
def test_wanted_gradients_do_not_depend_on_the_others(case, isa):
    problem = make_problem(replace(case, num_sets=2))
    everything = run(problem)
    for names in [*([name] for name in float_tensors(problem)), ["query", "segment1.key"], ["key", "segment0.value"]]:
        found = differentiate(problem, everything["out"], everything["lse"], names)
        assert set(found) == {f"grad.{name}" for name in names}
        assert_same_bits(found, {name: everything[name] for name in found})


@pytest.mark.parametrize(
    ("wanted", "unread"),
    [
        (["segment0.key", "segment0.value"], ["key", "value", "segment1.key", "segment1.value"]),
        (["segment0.value", "value"], ["segment0.value", "value", "segment1.key", "segment1.value"]),
        (["key"], ["segment0.key", "segment0.value", "segment1.key", "segment1.value"]),
    ],
    ids=["one set", "values", "own keys"],
)
def test_what_no_wanted_gradient_needs_is_not_read(wanted, unread, isa):
    """Poisoned after the forward, it changes nothing."""
    problem = make_problem(Case(B=4, Tq=20, Tk=20, P=30, D=16, num_sets=2))
    before = run(problem)
    named = float_tensors(problem)
    poisoned = {name: torch.full_like(t, torch.nan) if name in unread else t for name, t in named.items()}
    found = differentiate(with_float_tensors(problem, poisoned), before["out"], before["lse"], wanted)
    assert_same_bits(found, {name: before[name] for name in found})


def test_offsets_beyond_two_to_the_31_elements(isa, tmp_path):
    """Rows 2^31 + 64 elements apart, in a sparse file."""
    apart = 2**31 + 64
    problem = make_problem(Case(B=2, H=2, Hkv=2, Tq=3, Tk=5, P=9, D=16, N=2, ids="random"))
    spread = {}
    for name, tensor in float_tensors(problem).items():
        file = torch.from_file(str(tmp_path / name), shared=True, size=apart + tensor[0].numel(), dtype=torch.float32)
        spread[name] = file.as_strided(tensor.shape, (apart, *tensor[0].contiguous().stride())).copy_(tensor)
    assert_same_bits(run(with_float_tensors(problem, spread)), run(problem))
