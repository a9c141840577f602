"""The operator inside PyTorch's machinery: opcheck, compile, autocast, checkpointing, vmap-free schemas."""

from dataclasses import replace

import pytest
import torch
from torch.utils._pytree import tree_map
from torch.utils.checkpoint import checkpoint

import prefix_fast
from prefix_fast import Segment, ops
from prefix_fast.testing import Case, make_problem

BACKENDS = ("reference", "cpu")

CASES = [
    Case(),
    Case(dtype=torch.bfloat16, prefix_dtype=torch.float32, H=4, Hkv=2),
    Case(B=3, N=3, ids="random", lengths="random", key_mask="left", query_offset="rows", num_sets=2),
    Case(B=3, N=2, packed=True, packed_segments=True, ids="random"),
    Case(dropout_p=0.2, query_offset="int", attn_bias=True),
]


def operator_arguments(case, backend, requires_grad=True):
    arguments = ops._to_arguments(make_problem(case), backend)
    if requires_grad:
        for tensor in (*arguments[:3], *arguments[3], *arguments[4]):
            tensor.requires_grad_()
    return arguments


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_operators_pass_opcheck(case, backend):
    arguments = operator_arguments(case, backend)
    torch.library.opcheck(torch.ops.prefix_fast.segment_attention.default, arguments)
    arguments = tree_map(lambda x: x.detach() if isinstance(x, torch.Tensor) else x, arguments)
    out, lse = torch.ops.prefix_fast.segment_attention(*arguments)
    wanted = [True, False, True, *[True] * (2 * len(arguments[3]))]
    torch.library.opcheck(
        torch.ops.prefix_fast.segment_attention_backward.default,
        (*arguments, out, lse, torch.randn_like(out), torch.randn_like(lse), wanted),
    )


def leaves(requires_grad=True):
    shapes = [(2, 4, 6, 16), (2, 2, 6, 16), (2, 2, 6, 16), (1, 2, 5, 16), (1, 2, 5, 16)]
    return [torch.randn(shape, requires_grad=requires_grad) for shape in shapes]


@pytest.mark.parametrize("backend", BACKENDS)
def test_compile_takes_the_whole_graph_forward_and_backward(backend):
    torch._dynamo.reset()
    inputs = leaves()

    def function(*tensors):
        out, lse = prefix_fast.prefix_attention(*tensors, backend=backend, return_lse=True)
        return (out * 2).sum() + lse.sum()

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    expected = torch.autograd.grad(function(*inputs), inputs)
    for a, b in zip(torch.autograd.grad(compiled(*inputs), inputs), expected, strict=True):
        torch.testing.assert_close(a, b)


def test_compile_takes_segments_ids_and_dropout_with_dynamic_shapes():
    torch._dynamo.reset()
    frames = torch._dynamo.testing.CompileCounter()

    def function(query, own, shared, ids):
        return prefix_fast.segment_attention(query, own, own, [Segment(shared, shared, ids=ids)], dropout_p=0.1)

    compiled = torch.compile(function, fullgraph=True, backend=frames, dynamic=True)
    for B, T, P in ((4, 3, 5), (5, 7, 9), (3, 11, 6)):
        ids = torch.randint(-1, 2, (B,))
        out = compiled(torch.randn(B, 2, T, 8), torch.randn(B, 2, T, 8), torch.randn(2, 2, P, 8), ids)
        assert out.shape == (B, 2, T, 8)
    assert frames.frame_count == 1


def test_compile_still_checks_values():
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda *tensors, ids: prefix_fast.prefix_attention(*tensors, prefix_ids=ids),
        fullgraph=True,
        backend="aot_eager",
    )
    with pytest.raises(ValueError, match=r"expected ids of segment set 0 in \[-1, 1\)"):
        compiled(*leaves(False), ids=torch.tensor([0, 5]))


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_casts_every_input_to_its_dtype(backend):
    inputs = leaves()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = prefix_fast.prefix_attention(*inputs, backend=backend)
    assert out.dtype == torch.bfloat16
    expected = prefix_fast.prefix_attention(*(t.bfloat16() for t in inputs), backend=backend)
    assert torch.equal(out, expected)
    out.float().sum().backward()
    assert all(t.grad.dtype == torch.float32 for t in inputs)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing_repeats_the_same_dropout(backend, use_reentrant):
    inputs = leaves()

    def function(*tensors):
        return prefix_fast.prefix_attention(*tensors, dropout_p=0.3, backend=backend)

    torch.manual_seed(3)
    plain = torch.autograd.grad(function(*inputs).square().sum(), inputs)
    torch.manual_seed(3)
    checkpoint(function, *inputs, use_reentrant=use_reentrant).square().sum().backward()
    for t, grad in zip(inputs, plain, strict=True):
        torch.testing.assert_close(t.grad, grad)


@pytest.mark.parametrize("options", [{}, {"dropout_p": 0.1}, {"prefix_ids": torch.tensor([0, -1])}], ids=str)
def test_meta_tensors_give_the_shapes_and_layouts_of_a_real_call(options):
    def facts(device):
        inputs = [t.detach().to(device).requires_grad_() for t in leaves()]
        moved = {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in options.items()}
        outputs = prefix_fast.prefix_attention(*inputs, **moved, return_lse=True)
        grads = torch.autograd.grad(sum(t.sum() for t in outputs), inputs)
        assert {t.device.type for t in (*outputs, *grads)} == {device}
        return [(t.shape, t.stride(), t.dtype) for t in (*outputs, *grads)]

    assert facts("meta") == facts("cpu")


def test_meta_tensors_of_packed_rows_give_the_shape_of_a_real_call():
    query, key, offsets = (torch.empty(*sizes, device="meta") for sizes in ((5, 4, 16), (7, 2, 16), (3,)))
    offsets = offsets.to(torch.int32)
    out = prefix_fast.segment_attention(query, key, key, [], cu_seqlens_q=offsets, cu_seqlens_k=offsets)
    assert out.device.type == "meta" and out.shape == (5, 4, 16)


def test_without_grad_nothing_is_recorded():
    with torch.no_grad():
        assert prefix_fast.prefix_attention(*leaves()).grad_fn is None
    with torch.inference_mode():
        assert prefix_fast.prefix_attention(*leaves(False)).shape == (2, 4, 6, 16)


def test_out_lies_in_memory_as_the_next_linear_layer_reads_it():
    out = prefix_fast.prefix_attention(*leaves(False))
    assert out.transpose(1, 2).is_contiguous()


class Seen(torch.utils._python_dispatch.TorchDispatchMode):
    """Takes note of the operators that it is asked for."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


class Wrapped(torch.Tensor):
    """A subclass that changes nothing."""


def goes_past_the_dispatcher(problem):
    return ops._dispatches_nothing(ops._tensors(problem))


@pytest.mark.parametrize("case", CASES[:4], ids=str)
@pytest.mark.parametrize("record", [False, True], ids=["no_grad", "grad"])
def test_plain_calls_give_the_bits_of_the_dispatcher_and_are_seen_by_whoever_looks(case, record):
    problem, name = make_problem(case), "prefix_fast::segment_attention"
    with torch.set_grad_enabled(record):
        assert goes_past_the_dispatcher(problem)
        found = ops.segment_attention(problem, "cpu")
        expected = torch.ops.prefix_fast.segment_attention(*ops._to_arguments(problem, "cpu"))
        assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
        with Seen() as seen:
            ops.segment_attention(problem, "cpu")
        assert name in seen.names
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            ops.segment_attention(problem, "cpu")
        assert name in {event.key for event in profile.key_averages()}
        assert not goes_past_the_dispatcher(replace(problem, key=problem.key.as_subclass(Wrapped)))
        assert not goes_past_the_dispatcher(replace(problem, query=problem.query.to("meta")))


@pytest.mark.parametrize("case", CASES[:4], ids=str)
def test_plain_gradients_are_those_of_the_dispatcher_and_are_seen_by_whoever_looks(case):
    problem = make_problem(case)
    inputs = [problem.query, problem.key, problem.value]
    inputs += [t for s in problem.sets for t in (s.key, s.value)]
    for tensor in inputs:
        tensor.requires_grad_()
    found = ops.segment_attention(problem, "cpu")
    expected = torch.ops.prefix_fast.segment_attention(*ops._to_arguments(problem, "cpu"))
    grad_out = torch.randn_like(found[0])
    of_plain, of_dispatcher = (
        torch.autograd.grad(out, inputs, grad_out, retain_graph=True) for out, _ in (found, expected)
    )
    assert all(torch.equal(*pair) for pair in zip(of_plain, of_dispatcher, strict=True))
    with Seen() as seen:
        torch.autograd.grad(found[0], inputs, grad_out)
    assert "prefix_fast::segment_attention_backward" in seen.names


def test_whoever_moves_saved_tensors_sees_those_of_a_plain_call():
    inputs, saved = leaves(), []

    def keep(tensor):
        saved.append(tensor)
        return len(saved) - 1

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda at: saved[at].clone()):
        out = prefix_fast.prefix_attention(*inputs)
    assert {t.data_ptr() for t in (*inputs, out)} <= {t.data_ptr() for t in saved}
    found = torch.autograd.grad(out.sum(), inputs)
    expected = torch.autograd.grad(prefix_fast.prefix_attention(*inputs).sum(), inputs)
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
