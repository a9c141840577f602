"""What the operator refuses: the exact type of error, what it names, what came and what to do."""

import pytest
import torch

import prefix_fast
from prefix_fast import Segment, prefix_attention, segment_attention

B, H, HKV, T, P, D, N = 2, 4, 2, 3, 5, 8, 1


def call(**changes):
    tensors = {
        "query": torch.randn(B, H, T, D),
        "key": torch.randn(B, HKV, T, D),
        "value": torch.randn(B, HKV, T, D),
        "prefix_key": torch.randn(N, HKV, P, D),
        "prefix_value": torch.randn(N, HKV, P, D),
    }
    arguments = {**tensors, **changes}
    return prefix_attention(**arguments)


BAD_CALLS = {
    "query-rank": ({"query": torch.randn(B, H, D)}, ValueError, r"expected query \[B, H, Tq, D\], got \(2, 4, 8\)"),
    "query-type": ({"query": [1.0]}, TypeError, "expected query to be a tensor, got list"),
    "query-integer": (
        {"query": torch.ones(B, H, T, D, dtype=torch.long)},
        TypeError,
        "expected query in float32.*int64",
    ),
    "query-sparse": ({"key": torch.randn(B, HKV, T, D).to_sparse()}, TypeError, "expected key to be a dense strided"),
    "head-dim-zero": (
        {"query": torch.randn(B, H, T, 0), "key": torch.randn(B, HKV, T, 0), "value": torch.randn(B, HKV, T, 0)},
        ValueError,
        "head dim D of at least 1",
    ),
    "key-rows": ({"key": torch.randn(B + 1, HKV, T, D)}, ValueError, r"expected key \[B, Hkv, Tk, D\] with B=2, D=8"),
    "value-shape": ({"value": torch.randn(B, HKV, T + 1, D)}, ValueError, "expected value shaped as key"),
    "value-head-dim": ({"value": torch.randn(B, HKV, T, D + 8)}, ValueError, "expected value shaped as key"),
    "heads-not-multiple": (
        {"key": torch.randn(B, 3, T, D), "value": torch.randn(B, 3, T, D)},
        ValueError,
        "a multiple of key's, got H=4 and Hkv=3",
    ),
    "prefix-rank": (
        {"prefix_key": torch.randn(8, 32, 64)},
        ValueError,
        r"expected prefix_key \[N, Hkv, P, D\] with Hkv=2, D=8, got \(8, 32, 64\)",
    ),
    "prefix-heads": ({"prefix_key": torch.randn(N, H, P, D)}, ValueError, "expected prefix_key .*Hkv=2"),
    "prefix-value-shape": (
        {"prefix_value": torch.randn(N, HKV, P + 1, D)},
        ValueError,
        "expected prefix_value shaped as prefix_key",
    ),
    "mixed-dtypes": (
        {"key": torch.randn(B, HKV, T, D).bfloat16()},
        TypeError,
        "expected key in query's dtype torch.float32, got torch.bfloat16; cast it or autocast",
    ),
    "prefix-half-beside-float": (
        {"prefix_key": torch.randn(N, HKV, P, D).half(), "prefix_value": torch.randn(N, HKV, P, D).half()},
        TypeError,
        "expected prefix_key in query's dtype torch.float32, got torch.float16",
    ),
    "prefix-key-value-dtypes": (
        {"prefix_value": torch.randn(N, HKV, P, D).half()},
        TypeError,
        "expected prefix_value in prefix_key's dtype",
    ),
    "stride": ({"query": torch.randn(B, H, D, T).transpose(2, 3)}, TypeError, "contiguous last dim, got stride 3"),
    "device": ({"prefix_key": torch.randn(N, HKV, P, D, device="meta")}, ValueError, "on query's device cpu, got meta"),
    "ids-missing": (
        {"prefix_key": torch.randn(3, HKV, P, D), "prefix_value": torch.randn(3, HKV, P, D)},
        ValueError,
        "expected prefix_ids to say which of the N=3",
    ),
    "ids-float": ({"prefix_ids": torch.zeros(B)}, TypeError, "expected prefix_ids to hold integers, got torch.float32"),
    "ids-list": ({"prefix_ids": [0, 0]}, TypeError, "expected prefix_ids to be an integer tensor, got list"),
    "ids-shape": (
        {"prefix_ids": torch.zeros(B + 1, dtype=torch.long)},
        ValueError,
        r"expected prefix_ids \[B\] = \[2\]",
    ),
    "ids-above": ({"prefix_ids": torch.tensor([0, 1])}, ValueError, r"in \[-1, 1\), got values from 0 to 1"),
    "ids-below": ({"prefix_ids": torch.tensor([0, -2])}, ValueError, r"in \[-1, 1\), got values from -2 to 0"),
    "lengths-above": ({"prefix_lengths": torch.tensor([P + 1])}, ValueError, r"between 0 and .*\(5\), got \[6\]"),
    "lengths-negative": ({"prefix_lengths": torch.tensor([-1])}, ValueError, r"between 0 and .*got \[-1\]"),
    "lengths-shape": ({"prefix_lengths": torch.tensor([1, 2])}, ValueError, r"expected prefix_lengths \[N\] = \[1\]"),
    "mask-float": ({"key_mask": torch.ones(B, T)}, TypeError, "expected key_mask to be a bool tensor"),
    "mask-4d": (
        {"key_mask": torch.ones(B, 1, T, T, dtype=torch.bool)},
        ValueError,
        r"expected key_mask \[B, Tk\] = \[2, 3\]",
    ),
    "bias-bool": ({"attn_bias": torch.ones(T, T, dtype=torch.bool)}, TypeError, "a bool mask is key_mask"),
    "bias-shape": (
        {"attn_bias": torch.ones(T, T + P)},
        ValueError,
        r"broadcastable to \[B, H, Tq, Tk\] = \[2, 4, 3, 3\]",
    ),
    "bias-double": (
        {"attn_bias": torch.ones(T, T).double()},
        TypeError,
        "of at most float32 beside torch.float32 queries",
    ),
    "bias-gradient": (
        {"attn_bias": torch.ones(T, T, requires_grad=True)},
        NotImplementedError,
        r"pass attn_bias.detach\(\)",
    ),
    "sinks-gradient": (
        {"sinks": torch.ones(H, requires_grad=True)},
        NotImplementedError,
        "expected sinks without gradient",
    ),
    "sinks-shape": ({"sinks": torch.ones(H + 1)}, ValueError, r"expected sinks \[H\] = \[4\]"),
    "scale-nan": ({"scale": float("nan")}, ValueError, "expected a finite scale, got nan"),
    "scale-tensor": ({"scale": torch.tensor(1.0)}, TypeError, "expected scale to be a number, got Tensor"),
    "softcap-zero": ({"softcap": 0.0}, ValueError, "expected softcap above 0"),
    "dropout-negative": ({"dropout_p": -0.1}, ValueError, r"expected dropout_p in \[0, 1\), got -0.1"),
    "dropout-one": ({"dropout_p": 1.0}, ValueError, r"expected dropout_p in \[0, 1\)"),
    "dropout-none": ({"dropout_p": None}, TypeError, "expected dropout_p to be a number, got NoneType"),
    "window-zero": ({"window": 0}, ValueError, "expected window of at least 1"),
    "window-float": ({"window": 2.0}, TypeError, "expected window to be an int, got float"),
    "offset-float": ({"query_offset": torch.zeros(B)}, TypeError, "expected query_offset to hold integers"),
    "offset-shape": ({"query_offset": torch.zeros(B, 1, dtype=torch.long)}, ValueError, r"query_offset 0-dim or \[B\]"),
    "causal-type": ({"is_causal": 1}, TypeError, "expected is_causal to be True or False, got int"),
    "backend-unknown": (
        {"backend": "flash"},
        ValueError,
        "expected backend to be one of auto, triton, cuda, cpu, reference, got 'flash'",
    ),
    "backend-elsewhere": ({"backend": "cuda"}, NotImplementedError, "cuda: (this installation|this machine|the cuda)"),
    "meta-cpu": (
        {name: torch.empty(B, HKV, T, D, device="meta") for name in ("query", "key", "value")}
        | {name: torch.empty(N, HKV, P, D, device="meta") for name in ("prefix_key", "prefix_value")}
        | {"backend": "cpu"},
        NotImplementedError,
        "cpu: the cpu backend takes cpu tensors, not meta",
    ),
    "cpu-float64": (
        {
            name: torch.randn(*shape, dtype=torch.float64)
            for name, shape in {
                "query": (B, H, T, D),
                "key": (B, HKV, T, D),
                "value": (B, HKV, T, D),
                "prefix_key": (N, HKV, P, D),
                "prefix_value": (N, HKV, P, D),
            }.items()
        }
        | {"backend": "cpu"},
        NotImplementedError,
        "cpu: .*float64",
    ),
}


@pytest.mark.parametrize(("changes", "error", "message"), BAD_CALLS.values(), ids=BAD_CALLS)
def test_a_bad_call_raises_and_says_what_was_expected(changes, error, message):
    with pytest.raises(error, match=message) as info:
        call(**changes)
    assert type(info.value) is error


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage:UserWarning")
def test_a_nested_tensor_is_a_type_error():
    with pytest.raises(TypeError, match="expected query to be a dense strided tensor, got nested"):
        call(query=torch.nested.nested_tensor([torch.randn(H, T, D)] * B))


def packed(**changes):
    arguments = {
        "query": torch.randn(5, H, D),
        "key": torch.randn(5, HKV, D),
        "value": torch.randn(5, HKV, D),
        "segments": [Segment(torch.randn(4, HKV, D), torch.randn(4, HKV, D), cu_seqlens=torch.tensor([0, 4]))],
        "cu_seqlens_q": torch.tensor([0, 2, 5]),
        "cu_seqlens_k": torch.tensor([0, 2, 5]),
    }
    return segment_attention(**{**arguments, **changes})


BAD_PACKED_CALLS = {
    "one-offset-only": ({"cu_seqlens_k": None}, ValueError, "together, got no cu_seqlens_k"),
    "offsets-short": ({"cu_seqlens_q": torch.tensor([0, 2, 4])}, ValueError, "cu_seqlens_q to ascend from 0 to 5"),
    "offsets-descend": ({"cu_seqlens_k": torch.tensor([0, 6, 5])}, ValueError, "cu_seqlens_k to ascend from 0 to 5"),
    "offsets-differ": ({"cu_seqlens_k": torch.tensor([0, 5])}, ValueError, "with B=2 as in cu_seqlens_q"),
    "offsets-float": ({"cu_seqlens_q": torch.tensor([0.0, 2, 5])}, TypeError, "cu_seqlens_q to hold integers"),
    "mask": ({"key_mask": torch.ones(2, 3, dtype=torch.bool)}, ValueError, "expected no key_mask with packed rows"),
    "longest": ({"max_seqlen_q": 2}, ValueError, "expected max_seqlen_q of at least 3"),
    "dense-query": ({"query": torch.randn(1, H, 5, D)}, ValueError, r"expected packed query \[total_q, H, D\]"),
    "segments-type": ({"segments": [torch.randn(1)]}, TypeError, "expected segments to be a Segment or a list"),
    "segment-offsets": (
        {"segments": [Segment(torch.randn(4, HKV, D), torch.randn(4, HKV, D), cu_seqlens=torch.tensor([0, 3]))]},
        ValueError,
        "cu_seqlens of segment set 0 to ascend from 0 to 4",
    ),
    "segment-dense-rank": (
        {"segments": [Segment(torch.randn(4, HKV, D), torch.randn(4, HKV, D))]},
        ValueError,
        r"expected segments\[0\].key \[N, Hkv, P, D\]",
    ),
}


@pytest.mark.parametrize(("changes", "error", "message"), BAD_PACKED_CALLS.values(), ids=BAD_PACKED_CALLS)
def test_a_bad_packed_call_raises_and_says_what_was_expected(changes, error, message):
    with pytest.raises(error, match=message):
        packed(**changes)


def test_a_good_packed_call_passes():
    assert packed().shape == (5, H, D)


def test_environment_backend_replaces_auto_and_yields_to_an_argument(monkeypatch):
    monkeypatch.setenv("PREFIX_FAST_BACKEND", "cuda")
    with pytest.raises(NotImplementedError, match=r"cuda: (this installation|this machine|the cuda)"):
        call()
    assert call(backend="reference").shape == (B, H, T, D)
    monkeypatch.setenv("PREFIX_FAST_BACKEND", "nonsense")
    with pytest.raises(ValueError, match="the environment variable PREFIX_FAST_BACKEND to be one of"):
        call()


def test_backends_lists_every_name_with_its_reason():
    infos = {info.name: info for info in prefix_fast.backends()}
    assert set(infos) == {"cpu", "reference", "triton", "cuda"}
    assert infos["reference"].available
    assert infos["triton"].available or "triton" in infos["triton"].reason.lower()
    assert all(info.available or info.reason for info in infos.values())


def test_a_second_derivative_raises_on_the_cpu_backend():
    query = torch.randn(B, H, T, D, requires_grad=True)
    out = call(query=query, backend="cpu")
    (grad,) = torch.autograd.grad(out.sum(), query, create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivatives exist on backend='reference' only"):
        grad.sum().backward()
