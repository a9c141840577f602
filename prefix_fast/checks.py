"""Checks of types and shapes behind the public functions. What they let through, every backend can rely on."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from prefix_fast.backends.problem import Plan, Problem, SegmentSet

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
HALVES = (torch.bfloat16, torch.float16)
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def checked_problem(
    caller: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sets: tuple[SegmentSet, ...],
    *,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    key_mask: Tensor | None,
    attn_bias: Tensor | None,
    is_causal: bool,
    query_offset: Tensor | int | None,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
    dropout_p: float,
    scale: float | None,
) -> Problem:
    """The call as a `Problem`, cast under autocast, with the dropout seed drawn. Raises as `prefix_attention` says."""
    names = _set_names(caller, len(sets))
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        _check_float_tensor(caller, name, tensor, query)
    for (key_name, value_name), s in zip(names, sets, strict=True):
        _check_float_tensor(caller, key_name, s.key, query)
        _check_float_tensor(caller, value_name, s.value, query)
    if query.device.type != "meta" and torch.is_autocast_enabled(query.device.type):  # meta tensors know no autocast
        query, key, value, sets = _autocast(query, key, value, sets)
    packed = cu_seqlens_q is not None or cu_seqlens_k is not None
    if packed:
        rows = _check_packed_rows(caller, query, key, value, cu_seqlens_q, cu_seqlens_k, key_mask, attn_bias)
    else:
        rows = _check_dense_rows(caller, query, key, value)
    for pair, segment_set in zip(names, sets, strict=True):
        _check_set(caller, pair, segment_set, query, key, rows)
    _check_masks(caller, query, key, key_mask, attn_bias)
    _check_positions(caller, query, rows, is_causal, query_offset, window, max_seqlen_q, max_seqlen_k)
    _check_softmax(caller, query, softcap, sinks, dropout_p, scale)
    seed = None
    if dropout_p > 0:
        seed = torch.randint(0, 2**62, (1,), dtype=torch.int64, device=query.device)
    scale = query.shape[-1] ** -0.5 if scale is None else float(scale)
    return Problem(
        query, key, value, sets, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, key_mask, attn_bias,
        is_causal, query_offset, window, softcap, sinks, dropout_p, seed, scale,
    )  # fmt: skip


def _set_names(caller: str, count: int) -> list[tuple[str, str]]:
    if caller == "prefix_attention":
        return [("prefix_key", "prefix_value")]
    return [(f"segments[{i}].key", f"segments[{i}].value") for i in range(count)]


def _check_float_tensor(caller: str, name: str, tensor: Tensor, query: Tensor) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{caller}: expected {name} to be a tensor, got {type(tensor).__name__}")
    is_float = tensor.dtype in FLOATS
    if tensor.layout != torch.strided or tensor.is_nested or (not is_float and tensor.is_quantized):
        kind = "quantized" if tensor.is_quantized else "nested" if tensor.is_nested else str(tensor.layout)
        raise TypeError(f"{caller}: expected {name} to be a dense strided tensor, got {kind}; convert it first")
    if not is_float:
        raise TypeError(f"{caller}: expected {name} in float32, bfloat16, float16 or float64, got {tensor.dtype}")
    if tensor.device != query.device:
        raise ValueError(f"{caller}: expected {name} on query's device {query.device}, got {tensor.device}; move it")
    if tensor.dim() and tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
        raise TypeError(
            f"{caller}: expected {name} with a contiguous last dim, got stride {tensor.stride(-1)} there; "
            f"call .contiguous()"
        )


def _autocast(query: Tensor, key: Tensor, value: Tensor, sets: tuple[SegmentSet, ...]) -> tuple:
    dtype = torch.get_autocast_dtype(query.device.type)

    def cast(tensor: Tensor) -> Tensor:
        return tensor if tensor.dtype == torch.float64 else tensor.to(dtype)

    sets = tuple(replace(s, key=cast(s.key), value=cast(s.value)) for s in sets)
    return cast(query), cast(key), cast(value), sets


def _check_dense_rows(caller: str, query: Tensor, key: Tensor, value: Tensor) -> int:
    if query.dim() != 4:
        raise ValueError(f"{caller}: expected query [B, H, Tq, D], got {_shape(query)}")
    rows, heads, _, head_dim = query.shape
    if key.dim() != 4 or key.shape[0] != rows or key.shape[3] != head_dim:
        raise ValueError(f"{caller}: expected key [B, Hkv, Tk, D] with B={rows}, D={head_dim}, got {_shape(key)}")
    _check_heads_and_values(caller, heads, head_dim, query, key, value)
    return rows


def _check_packed_rows(
    caller: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    key_mask: Tensor | None,
    attn_bias: Tensor | None,
) -> int:
    if cu_seqlens_q is None or cu_seqlens_k is None:
        missing = "cu_seqlens_q" if cu_seqlens_q is None else "cu_seqlens_k"
        raise ValueError(f"{caller}: expected cu_seqlens_q and cu_seqlens_k together, got no {missing}")
    for name, given in (("key_mask", key_mask), ("attn_bias", attn_bias)):
        if given is not None:
            raise ValueError(f"{caller}: expected no {name} with packed rows, got one; leave masked tokens out instead")
    if query.dim() != 3:
        raise ValueError(f"{caller}: expected packed query [total_q, H, D], got {_shape(query)}")
    _, heads, head_dim = query.shape
    if key.dim() != 3 or key.shape[2] != head_dim:
        raise ValueError(f"{caller}: expected packed key [total_k, Hkv, D] with D={head_dim}, got {_shape(key)}")
    _check_integers(caller, "cu_seqlens_q", cu_seqlens_q, query)
    if cu_seqlens_q.dim() != 1 or cu_seqlens_q.shape[0] < 1:
        raise ValueError(f"{caller}: expected cu_seqlens_q [B + 1], got {_shape(cu_seqlens_q)}")
    rows = cu_seqlens_q.shape[0] - 1
    _check_integers(caller, "cu_seqlens_k", cu_seqlens_k, query)
    if cu_seqlens_k.shape != cu_seqlens_q.shape:
        raise ValueError(
            f"{caller}: expected cu_seqlens_k [B + 1] with B={rows} as in cu_seqlens_q, got {_shape(cu_seqlens_k)}"
        )
    _check_heads_and_values(caller, heads, head_dim, query, key, value)
    return rows


def _check_heads_and_values(caller: str, heads: int, head_dim: int, query: Tensor, key: Tensor, value: Tensor) -> None:
    if head_dim == 0:
        raise ValueError(f"{caller}: expected a head dim D of at least 1, got query {_shape(query)}")
    if value.shape != key.shape:
        raise ValueError(f"{caller}: expected value shaped as key {_shape(key)}, got {_shape(value)}")
    kv_heads = key.shape[1]
    if kv_heads == 0 or heads % kv_heads:
        raise ValueError(
            f"{caller}: expected query's heads to be a multiple of key's, got H={heads} and Hkv={kv_heads}"
        )
    for name, tensor in (("key", key), ("value", value)):
        if tensor.dtype != query.dtype:
            raise TypeError(
                f"{caller}: expected {name} in query's dtype {query.dtype}, got {tensor.dtype}; cast it or autocast"
            )


def _check_set(
    caller: str, names: tuple[str, str], segment_set: SegmentSet, query: Tensor, own_key: Tensor, rows: int
) -> None:
    key_name, value_name = names
    key, value = segment_set.key, segment_set.value
    kv_heads, head_dim = own_key.shape[1], own_key.shape[-1]
    if segment_set.cu_seqlens is None:
        fits = key.dim() == 4 and key.shape[1] == kv_heads and key.shape[3] == head_dim
        expected = f"[N, Hkv, P, D] with Hkv={kv_heads}, D={head_dim}"
    else:
        fits = key.dim() == 3 and key.shape[1] == kv_heads and key.shape[2] == head_dim
        expected = f"[total, Hkv, D] with Hkv={kv_heads}, D={head_dim}"
        _check_integers(caller, "cu_seqlens of a segment", segment_set.cu_seqlens, query)
        if segment_set.cu_seqlens.dim() != 1 or segment_set.cu_seqlens.shape[0] < 1:
            raise ValueError(
                f"{caller}: expected cu_seqlens of a segment [N + 1], got {_shape(segment_set.cu_seqlens)}"
            )
    if not fits:
        raise ValueError(f"{caller}: expected {key_name} {expected}, got {_shape(key)}")
    if value.shape != key.shape:
        raise ValueError(f"{caller}: expected {value_name} shaped as {key_name} {_shape(key)}, got {_shape(value)}")
    if key.dtype != value.dtype:
        raise TypeError(f"{caller}: expected {value_name} in {key_name}'s dtype {key.dtype}, got {value.dtype}")
    if key.dtype != query.dtype and not (key.dtype == torch.float32 and query.dtype in HALVES):
        also = " or float32" if query.dtype in HALVES else ""
        raise TypeError(f"{caller}: expected {key_name} in query's dtype {query.dtype}{also}, got {key.dtype}")
    _check_choice(caller, key_name.removesuffix("key"), segment_set, query, rows)


def _check_choice(caller: str, prefix: str, segment_set: SegmentSet, query: Tensor, rows: int) -> None:
    """Ids, lengths and bias of a set, named `prefix_ids` or `segments[0].ids` in messages."""
    count = segment_set.count
    if segment_set.ids is None:
        if count != 1:
            raise ValueError(
                f"{caller}: expected {prefix}ids to say which of the N={count} segments each row reads, got None; "
                f"without ids N is 1"
            )
    else:
        _check_integers(caller, f"{prefix}ids", segment_set.ids, query, shape=(rows,), meaning="[B]")
    if segment_set.plan is not None:
        if segment_set.ids is None or not isinstance(segment_set.plan, Plan):
            given = type(segment_set.plan).__name__
            raise TypeError(f"{caller}: expected a plan made by make_plan beside the ids that it is of, got {given}")
        order, starts = segment_set.plan
        _check_integers(caller, "plan.order", order, query, shape=(rows,), meaning="[B]")
        _check_integers(caller, "plan.starts", starts, query, shape=(count + 2,), meaning="[N + 2]")
    if segment_set.lengths is not None:
        _check_integers(caller, f"{prefix}lengths", segment_set.lengths, query, shape=(count,), meaning="[N]")
    if segment_set.bias is not None:
        if segment_set.cu_seqlens is not None:
            raise ValueError(f"{caller}: expected no {prefix}bias with packed segments, got one; use dense segments")
        _check_bias(caller, f"{prefix}bias", segment_set.bias, query, segment_set.key.shape[2], "P")


def _check_integers(
    caller: str,
    name: str,
    tensor: Tensor,
    query: Tensor,
    shape: tuple[int, ...] | None = None,
    meaning: str = "",
) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{caller}: expected {name} to be an integer tensor, got {type(tensor).__name__}")
    if tensor.dtype not in INTEGERS:
        raise TypeError(f"{caller}: expected {name} to hold integers, got {tensor.dtype}")
    if tensor.device != query.device:
        raise ValueError(f"{caller}: expected {name} on query's device {query.device}, got {tensor.device}; move it")
    if shape is not None and tensor.shape != shape:
        raise ValueError(f"{caller}: expected {name} {meaning} = {list(shape)}, got {_shape(tensor)}")


def _check_masks(caller: str, query: Tensor, key: Tensor, key_mask: Tensor | None, attn_bias: Tensor | None) -> None:
    if key_mask is not None:
        if not isinstance(key_mask, Tensor) or key_mask.dtype != torch.bool:
            got = key_mask.dtype if isinstance(key_mask, Tensor) else type(key_mask).__name__
            raise TypeError(
                f"{caller}: expected key_mask to be a bool tensor, True where a key may be attended, got {got}; "
                f"an additive mask is attn_bias"
            )
        if key_mask.shape != (key.shape[0], key.shape[2]):
            raise ValueError(
                f"{caller}: expected key_mask [B, Tk] = {[key.shape[0], key.shape[2]]}, got {_shape(key_mask)}"
            )
        if key_mask.device != query.device:
            raise ValueError(f"{caller}: expected key_mask on query's device {query.device}, got {key_mask.device}")
    if attn_bias is not None:
        _check_bias(caller, "attn_bias", attn_bias, query, key.shape[2], "Tk")


def _check_bias(caller: str, name: str, bias: Tensor, query: Tensor, keys: int, letter: str) -> None:
    if not isinstance(bias, Tensor) or bias.dtype not in FLOATS:
        got = bias.dtype if isinstance(bias, Tensor) else type(bias).__name__
        raise TypeError(f"{caller}: expected {name} to be a floating-point tensor, got {got}; a bool mask is key_mask")
    if bias.dtype == torch.float64 and query.dtype != torch.float64:
        raise TypeError(
            f"{caller}: expected {name} of at most float32 beside {query.dtype} queries, got float64; cast it"
        )
    full = (*query.shape[:3], keys) if query.dim() == 4 else None
    if full is None:
        raise ValueError(f"{caller}: expected no {name} with packed rows, got one")
    if bias.dim() > 4 or any(
        given not in (1, wanted) for given, wanted in zip(reversed(bias.shape), reversed(full), strict=False)
    ):
        raise ValueError(
            f"{caller}: expected {name} broadcastable to [B, H, Tq, {letter}] = {list(full)}, got {_shape(bias)}"
        )
    if bias.device != query.device:
        raise ValueError(f"{caller}: expected {name} on query's device {query.device}, got {bias.device}")
    _refuse_gradient(caller, name, bias)


def _check_positions(
    caller: str,
    query: Tensor,
    rows: int,
    is_causal: bool,
    query_offset: Tensor | int | None,
    window: int | None,
    max_seqlen_q: int | None,
    max_seqlen_k: int | None,
) -> None:
    if not isinstance(is_causal, bool):
        raise TypeError(f"{caller}: expected is_causal to be True or False, got {type(is_causal).__name__}")
    if isinstance(query_offset, Tensor):
        _check_integers(caller, "query_offset", query_offset, query)
        if query_offset.dim() > 1 or (query_offset.dim() == 1 and query_offset.shape[0] != rows):
            raise ValueError(f"{caller}: expected query_offset 0-dim or [B] = [{rows}], got {_shape(query_offset)}")
    elif query_offset is not None:
        _check_int(caller, "query_offset", query_offset)
    if window is not None:
        _check_int(caller, "window", window, least=1)
    if max_seqlen_q is not None:
        _check_int(caller, "max_seqlen_q", max_seqlen_q, least=0)
    if max_seqlen_k is not None:
        _check_int(caller, "max_seqlen_k", max_seqlen_k, least=0)


def _check_int(caller: str, name: str, number: int, least: int | None = None) -> None:
    if isinstance(number, bool) or not isinstance(number, (int, torch.SymInt)):
        raise TypeError(f"{caller}: expected {name} to be an int, got {type(number).__name__}")
    if least is not None and number < least:
        raise ValueError(f"{caller}: expected {name} of at least {least}, got {number}")


def _check_softmax(
    caller: str,
    query: Tensor,
    softcap: float | None,
    sinks: Tensor | None,
    dropout_p: float,
    scale: float | None,
) -> None:
    _check_number(caller, "dropout_p", dropout_p)
    if scale is not None:
        _check_number(caller, "scale", scale)
    if softcap is not None:
        _check_number(caller, "softcap", softcap)
        if softcap <= 0:
            raise ValueError(f"{caller}: expected softcap above 0, got {softcap}")
    if not 0 <= dropout_p < 1:
        raise ValueError(f"{caller}: expected dropout_p in [0, 1), got {dropout_p}")
    if sinks is not None:
        _check_float_tensor(caller, "sinks", sinks, query)
        heads = query.shape[1]
        if sinks.shape != (heads,):
            raise ValueError(f"{caller}: expected sinks [H] = [{heads}], got {_shape(sinks)}")
        _refuse_gradient(caller, "sinks", sinks)


def _check_number(caller: str, name: str, number: float) -> None:
    if isinstance(number, bool) or not isinstance(number, (int, float, torch.SymFloat)):
        raise TypeError(f"{caller}: expected {name} to be a number, got {type(number).__name__}")
    if not -math.inf < number < math.inf:
        raise ValueError(f"{caller}: expected a finite {name}, got {number}")


def _refuse_gradient(caller: str, name: str, tensor: Tensor) -> None:
    if tensor.requires_grad and torch.is_grad_enabled():
        raise NotImplementedError(
            f"{caller}: expected {name} without gradient, got one that requires it, which no backend computes; "
            f"pass {name}.detach()"
        )


def _shape(tensor: Tensor) -> str:
    return str(tuple(tensor.shape))
