"""Head and loss in chunks: against the composition in float64, for every way to run it, and what it never holds."""

import importlib.util
import math
from pathlib import Path

import pytest
import torch
from interpreted import run_cases
from native_inputs import ISAS
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from prefix_fast import linear_loss
from prefix_fast.backends import cross_entropy as passes
from prefix_fast.backends import native, triton
from prefix_fast.linear_loss import linear_cross_entropy

WIDTH = 24
OPTIONS = {
    "plain": {},
    "smoothing": {"label_smoothing": 0.1},
    "z-loss": {"z_loss": 0.01},
    "scale": {"logit_scale": 0.3},
    "softcap": {"softcap": 2.0},
    "sum": {"denominator": 1},
    "items": {"denominator": torch.tensor(7)},
    "ignored-is-a-word": {"ignore_index": 5},
    "everything": {"label_smoothing": 0.2, "z_loss": 0.1, "logit_scale": 1.5, "softcap": 3.0, "denominator": 3.5},
}
# (vocabulary, rows): words around the width of vectors, one word, one row
SHAPES = [(1, 3), (15, 5), (16, 5), (63, 7), (64, 7), (65, 1), (257, 33), (5000, 3)]


def inputs(vocabulary: int, rows: int, dtype: torch.dtype = torch.float32, bias: bool = False, seed: int = 0):
    """hidden, weight, bias and targets, a third of which are ignored."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, WIDTH, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(vocabulary, WIDTH, generator=generator).to(dtype)
    offsets = torch.randn(vocabulary, generator=generator).to(dtype) if bias else None
    targets = torch.randint(vocabulary, (rows,), generator=generator)
    targets[1::3] = -100
    return hidden, weight, offsets, targets


def composed(
    hidden, weight, bias, targets, *, weights=None, denominator=None, ignore_index=-100, label_smoothing=0.0,
    z_loss=0.0, logit_scale=1.0, softcap=None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The loss and the gradient of the hidden states in float64, from PyTorch's own functions."""
    hidden = hidden.detach().double().requires_grad_()
    logits = torch.nn.functional.linear(hidden, weight.double(), None if bias is None else bias.double()) * logit_scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    kept = targets != ignore_index
    factors = kept.double() if weights is None else weights.double() * kept
    losses = cross_entropy(
        logits, targets, ignore_index=ignore_index, label_smoothing=label_smoothing, reduction="none"
    )
    losses = losses + z_loss * torch.logsumexp(logits, -1) ** 2
    loss = (losses * factors).sum() / (factors.sum() if denominator is None else denominator)
    loss.backward()
    return loss.detach(), hidden.grad


def found(*args, **options) -> tuple[Tensor, Tensor]:
    hidden = args[0].detach().requires_grad_()
    loss = linear_cross_entropy(hidden, *args[1:], **options)
    loss.backward()
    return loss.detach(), hidden.grad


def assert_agree(ours: tuple[Tensor, Tensor], truth: tuple[Tensor, Tensor], loss: float, grad: float) -> None:
    assert abs(ours[0].double() - truth[0]) <= loss * (1 + abs(truth[0]))
    error = (ours[1].double() - truth[1]).norm()
    assert error <= grad * truth[1].norm() + 1e-12


@pytest.fixture(params=[*ISAS, "plain", pytest.param("triton", marks=pytest.mark.skipif(
    not triton.interpreting(), reason="runs in a process with TRITON_INTERPRET=1"))])  # fmt: skip
def way(request, monkeypatch):
    """Each way to run the pass over the logits; the others must not be taken."""
    name = request.param
    if name in native.LEVELS:
        monkeypatch.setenv("PREFIX_FAST_CPU_ISA", name)
        name = "in_cpp"
    elif name == "triton":
        name = "in_triton"
    if triton.interpreting() and name != "in_triton":
        pytest.skip("TRITON_INTERPRET is set")
    chosen = getattr(passes, name)
    monkeypatch.setattr(passes, "run", lambda x, *rest: (chosen if x.numel() else passes.plain)(x, *rest))
    return name


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize(("vocabulary", "rows"), [(65, 7), (257, 33)])
def test_every_option_agrees_with_float64(way, options, vocabulary, rows):
    given = inputs(vocabulary, rows, bias=bool(options))
    if "ignore_index" in options:
        given[3][given[3] == -100] = 5
    assert_agree(found(*given, **options), composed(*given, **options), 1e-6, 2e-6)


@pytest.mark.parametrize(("vocabulary", "rows"), SHAPES)
def test_vocabularies_of_every_rest_agree(way, vocabulary, rows):
    given = inputs(vocabulary, rows)
    weights = torch.rand(rows)
    options = {"weights": weights, "label_smoothing": 0.1}
    assert_agree(found(*given, **options), composed(*given, **options), 1e-6, 2e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("options", [OPTIONS["plain"], OPTIONS["everything"]], ids=["plain", "everything"])
def test_half_precision_is_as_close_as_transformers(way, dtype, options):
    """Logits in half precision, the softmax in float32: twice the error of the same with PyTorch's functions."""
    hidden, weight, bias, targets = inputs(257, 33, dtype, bias=True)
    truth = composed(hidden, weight, bias, targets, **options)
    eager = hidden.detach().requires_grad_()
    logits = torch.nn.functional.linear(eager, weight, bias).float() * options.get("logit_scale", 1.0)
    if "softcap" in options:
        logits = options["softcap"] * torch.tanh(logits / options["softcap"])
    losses = cross_entropy(logits, targets, label_smoothing=options.get("label_smoothing", 0.0), reduction="none")
    losses = losses + (options.get("z_loss", 0.0) * torch.logsumexp(logits, -1) ** 2).where(targets >= 0, 0)
    loss = losses.sum() / options.get("denominator", (targets >= 0).sum())
    loss.backward()
    slack = {torch.bfloat16: 4e-3, torch.float16: 5e-4}[dtype]
    ours = found(hidden, weight, bias, targets, **options)
    assert ours[0].dtype == torch.float32 and ours[1].dtype == dtype
    assert abs(ours[0] - truth[0]) <= 2 * abs(loss.detach() - truth[0]) + slack * abs(truth[0])
    theirs = (eager.grad.double() - truth[1]).norm()
    assert (ours[1].double() - truth[1]).norm() <= 2 * theirs + slack * truth[1].norm()


def test_large_and_equal_logits_stay_exact(way):
    hidden, weight, _, targets = inputs(257, 33)
    for factor in (1e3, 0.0):
        assert_agree(found(hidden, weight * factor, None, targets), composed(hidden, weight * factor, None, targets),
                     1e-6, 1e-4)  # fmt: skip


@pytest.mark.parametrize("rows", [5, 6, 7, 12, 13])
def test_chunk_borders_change_nothing(way, rows, monkeypatch):
    given = inputs(65, rows)
    monkeypatch.setattr(linear_loss, "CHUNK_BYTES", 6 * 65 * 4)
    assert linear_loss.chunk_rows(rows, 65, 4) <= 6
    options = {"weights": torch.rand(rows), "denominator": 3}
    assert_agree(found(*given, **options), composed(*given, **options), 1e-6, 2e-6)


def test_no_row_and_no_label(way):
    hidden, weight, _, targets = inputs(65, 6)
    for rows in (0, 6):
        given = hidden[:rows], weight, None, torch.full_like(targets[:rows], -100)
        loss, grad = found(*given)
        assert torch.isnan(loss) and grad.shape == (rows, WIDTH)
        loss, grad = found(*given, denominator=3)
        assert loss == 0
        assert not grad.any()


def test_ignored_rows_may_hold_anything(way):
    hidden, weight, _, targets = inputs(65, 7)
    expected = found(hidden, weight, None, targets)
    poisoned = hidden.detach().clone()
    poisoned[targets == -100] = torch.nan
    loss, grad = linear_cross_entropy(poisoned.requires_grad_(), weight, None, targets), poisoned
    loss.backward()
    assert loss == expected[0]
    assert torch.equal(grad.grad[targets != -100], expected[1][targets != -100])
    assert torch.equal(expected[1][targets == -100], torch.zeros_like(expected[1][targets == -100]))


def test_shapes_of_sequences(way):
    hidden, weight, bias, targets = inputs(65, 12, bias=True)
    expected = found(hidden, weight, bias, targets)
    wide = torch.empty(3, 4, 2 * WIDTH)
    wide[..., ::2] = hidden.detach().view(3, 4, WIDTH)
    loss, grad = found(wide[..., ::2], weight, bias, targets.view(3, 4).to(torch.int32))
    assert_agree((loss, grad.view(12, WIDTH)), tuple(x.double() for x in expected), 1e-6, 1e-6)


def test_backward_scales_the_gradient_every_time(way):
    hidden, weight, _, targets = inputs(65, 7)
    (once,) = torch.autograd.grad(linear_cross_entropy(hidden, weight, None, targets), hidden)
    loss = linear_cross_entropy(hidden, weight, None, targets)
    for factor in (3.0, 0.5):
        (scaled,) = torch.autograd.grad(factor * loss, hidden, retain_graph=True)
        torch.testing.assert_close(scaled, factor * once, rtol=1e-6, atol=0)


def test_gradient_in_float64():
    hidden, weight, bias, targets = inputs(17, 7, torch.float64, bias=True)
    for options in ({}, {"label_smoothing": 0.2, "z_loss": 0.1, "logit_scale": 1.5, "softcap": 3.0}):
        torch.autograd.gradcheck(
            lambda h, options=options: linear_cross_entropy(h, weight, bias, targets, **options), hidden
        )


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("softcap", [0.0, 3.0])
def test_bits_do_not_depend_on_threads_or_rows(isa, softcap, monkeypatch):
    monkeypatch.setenv("PREFIX_FAST_CPU_ISA", isa)
    logits, targets = torch.randn(37, 1003), torch.randint(1003, (37,))
    terms = passes.Terms(label_smoothing=0.1, z_loss=0.01, softcap=softcap or None)

    def run(rows: slice) -> tuple[Tensor, Tensor]:
        grad = logits[rows].clone()
        return passes.in_cpp(grad, targets[rows].contiguous(), None, terms, True), grad

    torch.set_num_threads(1)
    expected = run(slice(None))
    for threads in (2, 3):
        torch.set_num_threads(threads)
        assert all(torch.equal(*pair) for pair in zip(run(slice(None)), expected, strict=True))
        assert all(torch.equal(a, b[5:9]) for a, b in zip(run(slice(5, 9)), expected, strict=True))


@pytest.mark.parametrize("wrong", [-1, 65, -101, 2**40])
def test_labels_out_of_the_vocabulary_raise(wrong):
    hidden, weight, _, targets = inputs(65, 7)
    targets[3] = wrong
    with pytest.raises(ValueError, match=rf"labels from 0 to 64, or -100 for none, got {wrong}"):
        linear_cross_entropy(hidden, weight, None, targets)


@pytest.mark.skipif(not triton.interpreting(), reason="runs in a process with TRITON_INTERPRET=1")
@pytest.mark.parametrize("wrong", [-1, 65, 2**40])
def test_labels_out_of_the_vocabulary_are_nan_in_the_kernel(wrong):
    logits, targets = torch.randn(3, 65), torch.tensor([4, wrong, 8])
    losses = passes.in_triton(logits, targets, None, passes.Terms(), True)
    assert torch.isnan(losses).tolist() == [False, True, False]
    assert torch.isfinite(logits).all()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda h, w, t: (h, w[:, 1:], None, t), ValueError, r"expected weight \(65, 24\), got \(65, 23\)"),
        (lambda h, w, t: (h, w, w[1:, 0], t), ValueError, r"expected bias \(65,\), got \(64,\)"),
        (lambda h, w, t: (h, w, None, t[1:]), ValueError, r"expected targets \(7,\), one for each hidden state, got"),
        (lambda h, w, t: (h, w.half(), None, t), TypeError, "expected weight in torch.float32, as hidden, got"),
        (lambda h, w, t: (h, w, None, t.float()), TypeError, "integer targets"),
        (lambda h, w, t: (h, w.requires_grad_(), None, t), ValueError, "a weight that requires gradients; freeze it"),
    ],
    ids=["weight", "bias", "targets", "dtype", "floats", "trainable"],
)
def test_bad_input_is_named(change, error, message):
    hidden, weight, _, targets = inputs(65, 7)
    with pytest.raises(error, match=message):
        linear_cross_entropy(*change(hidden, weight, targets))
    with pytest.raises(ValueError, match="expected softcap > 0, or None for none, got 0"):
        linear_cross_entropy(hidden, weight.detach(), None, targets, softcap=0)


def test_second_derivatives_raise():
    hidden, weight, _, targets = inputs(65, 7)
    (grad,) = torch.autograd.grad(linear_cross_entropy(hidden, weight, None, targets), hidden, create_graph=True)
    with pytest.raises(NotImplementedError, match="expected one derivative"):
        grad.sum().backward()


def test_autocast_multiplies_in_its_dtype():
    hidden, weight, bias, targets = inputs(65, 12, bias=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, grad = found(hidden, weight, bias, targets)
    half = found(*(x.to(torch.bfloat16) for x in (hidden, weight, bias)), targets)
    assert loss.dtype == grad.dtype == torch.float32
    assert loss == half[0]
    assert torch.equal(grad, half[1].float())


class Largest(TorchDispatchMode):
    """The most elements of any tensor that an operation returns."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        self.elements = max([self.elements, *sizes])
        return result


def test_logits_of_all_rows_never_exist(monkeypatch):
    hidden, weight, bias, targets = inputs(2001, 1024, bias=True)
    monkeypatch.setattr(linear_loss, "CHUNK_BYTES", 16 * 2001 * 4)
    with Largest() as seen:
        linear_cross_entropy(hidden, weight, bias, targets).backward()
    assert seen.elements == max(2001 * WIDTH, 16 * 2001)
    with Largest() as seen:
        cross_entropy(torch.nn.functional.linear(hidden, weight, bias), targets).backward()
    assert seen.elements == 1024 * 2001


def test_nothing_is_differentiated_where_no_gradient_is_wanted(monkeypatch):
    hidden, weight, _, targets = inputs(65, 7)
    wanted, run = [], passes.run
    monkeypatch.setattr(passes, "run", lambda *args: (wanted.append(args[-1]), run(*args))[1])
    with torch.no_grad():
        assert not linear_cross_entropy(hidden, weight, None, targets).requires_grad
    linear_cross_entropy(hidden.detach(), weight, None, targets)
    linear_cross_entropy(hidden, weight, None, targets)
    assert wanted == [False, False, True]


def test_chunks_are_even_and_within_their_size():
    for rows in (0, 1, 100, 668, 669, 100_000):
        chunk = linear_loss.chunk_rows(rows, 50257, 4)
        assert chunk == 1 or chunk * 50257 * 4 <= linear_loss.CHUNK_BYTES
        if rows:
            assert math.ceil(rows / chunk) * chunk - rows < math.ceil(rows / chunk)
    assert linear_loss.chunk_rows(10, 10**9, 4) == 1


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_the_triton_kernel_has_the_same_properties(root: Path):
    run_cases(root, Path(__file__).name, "(triton or in_the_kernel) and not same_properties")
