"""PrefixAttention: the module for hand-written models."""

import pytest
import torch

from prefix_fast.functional import prefix_attention
from prefix_fast.modules import PrefixAttention


def inputs(heads: int = 4, kv_heads: int = 2) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.randn(3, heads, 5, 8), torch.randn(3, kv_heads, 5, 8), torch.randn(3, kv_heads, 5, 8)


def test_module_is_the_operator_with_its_own_parameters() -> None:
    module = PrefixAttention(7, num_heads=4, head_dim=8, num_kv_heads=2, num_prefixes=2)
    assert module.prefix_key.shape == module.prefix_value.shape == (2, 2, 7, 8)
    query, key, value = inputs()
    options = {"prefix_ids": torch.tensor([1, -1, 0]), "is_causal": False, "return_lse": True}
    out, lse = module(query, key, value, **options)
    expected = prefix_attention(query, key, value, module.prefix_key, module.prefix_value, **options)
    torch.testing.assert_close((out, lse), expected, rtol=0, atol=0)
    out.square().sum().backward()
    assert module.prefix_key.grad.abs().sum() > 0 and module.prefix_value.grad.abs().sum() > 0


def test_module_is_softmax_over_prefix_and_own_tokens() -> None:
    module = PrefixAttention(7, num_heads=2, head_dim=8)
    query, key, value = inputs(2, 2)
    keys = torch.cat([module.prefix_key.expand(3, -1, -1, -1), key], dim=2)
    values = torch.cat([module.prefix_value.expand(3, -1, -1, -1), value], dim=2)
    expected = torch.nn.functional.scaled_dot_product_attention(query, keys, values)
    torch.testing.assert_close(module(query, key, value, is_causal=False), expected, rtol=1e-5, atol=1e-5)


def test_module_without_virtual_tokens_is_plain_attention() -> None:
    module = PrefixAttention(0, num_heads=2, head_dim=8)
    query, key, value = inputs(2, 2)
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
    torch.testing.assert_close(module(query, key, value), expected, rtol=1e-5, atol=1e-5)


def test_state_dict_and_repr() -> None:
    module = PrefixAttention(7, num_heads=4, head_dim=8, num_kv_heads=2, dtype=torch.bfloat16)
    assert list(module.state_dict()) == ["prefix_key", "prefix_value"]
    assert module.prefix_key.dtype == torch.bfloat16
    expected = "num_virtual_tokens=7, num_heads=4, head_dim=8, num_kv_heads=2, num_prefixes=1"
    assert repr(module) == f"PrefixAttention({expected})"


@pytest.mark.parametrize(
    ("sizes", "error", "message"),
    [
        ((-1, 4, 8), ValueError, "num_virtual_tokens >= 0, got -1"),
        ((7, 0, 8), ValueError, "num_heads >= 1, got 0"),
        ((7, 4, 8.0), TypeError, r"head_dim to be an integer, got 8\.0"),
        ((7, 4, 8, 3), ValueError, "num_heads to be a multiple of num_kv_heads, got 4 and 3"),
        ((7, 4, 8, 2, 0), ValueError, "num_prefixes >= 1, got 0"),
    ],
)
def test_impossible_sizes_are_refused(sizes: tuple[int, ...], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match="PrefixAttention: expected " + message):
        PrefixAttention(*sizes)


def test_query_with_other_heads_is_refused() -> None:
    query, key, value = inputs(8, 2)
    with pytest.raises(ValueError, match=r"query \[B, H, Tq, D\] with H=4, got \(3, 8, 5, 8\)"):
        PrefixAttention(7, 4, 8, 2)(query, key, value)
