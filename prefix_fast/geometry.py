"""What a model asks of a prefix (sites; layers, key/value heads and head dim of each), and PEFT's flat layout of it."""

import operator
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

# The attentions that can read a prefix: the encoder's to its own tokens, the decoder's to its own, the decoder's to the
# encoder's states.
SITES = ("encoder", "decoder", "cross")
# Layers whose cache is one key and one value per token and head; a sliding window is a mask over them.
_ATTENTION_LAYERS = {"full_attention", "sliding_attention", "chunked_attention", "attention"}


def checked_integer(value: Any, name: str, minimum: int, where: str) -> int:
    """The value as an int of at least `minimum`; TypeError for no integer, ValueError for a small one."""
    try:
        if isinstance(value, bool):
            raise TypeError
        number = operator.index(value)
    except TypeError:
        raise TypeError(
            f"{where}: expected {name} to be an integer, got {value!r} ({type(value).__name__}); pass a whole number"
        ) from None
    if number < minimum:
        raise ValueError(f"{where}: expected {name} >= {minimum}, got {number}; pass a larger number")
    return number


@dataclass(frozen=True)
class Geometry:
    """The shape of a site's keys and values, which a prefix must share: of a decoder-only model, its cache's.

    Args:
        num_layers: L, layers with attention.
        num_kv_heads: Hkv, key/value heads of a layer.
        head_dim: D, the same for keys and values.

    Raises:
        TypeError: a field is not an integer. ValueError: a field is below 1.
    """

    num_layers: int
    num_kv_heads: int
    head_dim: int

    def __post_init__(self) -> None:
        for name in ("num_layers", "num_kv_heads", "head_dim"):
            number = checked_integer(getattr(self, name), name, 1, "Geometry")
            object.__setattr__(self, name, number)

    @property
    def token_dim(self) -> int:
        """Hkv · D: what PEFT calls the token dim after its correction for grouped heads."""
        return self.num_kv_heads * self.head_dim

    @property
    def flat_dim(self) -> int:
        """2 · L · Hkv · D: one virtual token's keys and values of all layers."""
        return 2 * self.num_layers * self.token_dim


@dataclass(frozen=True)
class ModelSites:
    """The sites at which a model can read a prefix.

    Args:
        geometries: of each site; in an encoder-decoder "cross" has the decoder's.
        is_encoder_decoder: what kind of model it is; of a prefix without a model, what kind it was made for.
    """

    geometries: Mapping[str, Geometry] = field(default_factory=dict)
    is_encoder_decoder: bool = False


def model_sites(model_config: Any) -> ModelSites:
    """The sites of a transformers model and their geometries, from its config.

    Args:
        model_config: a transformers config, a Geometry (of a decoder-only model), or ModelSites, which are returned.

    Raises:
        TypeError, ValueError, NotImplementedError: as `model_geometry`; an encoder-decoder whose config does not name
            the sizes of both parts.
    """
    if isinstance(model_config, ModelSites):
        return model_config
    if isinstance(model_config, (Geometry, dict, str, type)) or not getattr(model_config, "is_encoder_decoder", False):
        return ModelSites({"decoder": model_geometry(model_config)})
    where = f"model_sites of {getattr(model_config, 'model_type', type(model_config).__name__)}"
    encoder_layers = _first(model_config, "encoder_layers", "num_layers")
    decoder_layers = _first(model_config, "decoder_layers", "num_decoder_layers")
    heads = _first(model_config, "num_heads"), _first(model_config, "num_heads")
    if heads[0] is None:
        heads = tuple(_first(model_config, f"{part}_attention_heads") for part in ("encoder", "decoder"))
    if None in (encoder_layers, decoder_layers, *heads) or _first(model_config, "d_model") is None:
        raise NotImplementedError(
            f"{where}: expected an encoder-decoder whose config names d_model and the layers and heads of its encoder"
            " and decoder, as BART's or T5's, got another; it cannot have a prefix"
        )
    encoder = Geometry(encoder_layers, heads[0], _width_of_head(model_config, heads[0], where))
    decoder = Geometry(decoder_layers, heads[1], _width_of_head(model_config, heads[1], where))
    return ModelSites({"encoder": encoder, "decoder": decoder, "cross": decoder}, is_encoder_decoder=True)


def _width_of_head(model_config: Any, heads: int, where: str) -> int:
    """D of an encoder-decoder's part with so many heads."""
    if _first(model_config, "d_kv") is not None:
        return model_config.d_kv
    if model_config.d_model % checked_integer(heads, "the heads", 1, where):
        raise ValueError(
            f"{where}: expected d_model to be a multiple of the heads, got {model_config.d_model} and {heads}; correct"
            " the model's config"
        )
    return model_config.d_model // heads


def model_geometry(model_config: Any) -> Geometry:
    """The geometry of a decoder-only transformers model, from its config.

    Args:
        model_config: a transformers config (of a multimodal model, its text part is read), or a Geometry,
            which is returned as it is.

    Raises:
        TypeError: not a config.
        ValueError: the config names no layers, heads or sizes, or sizes that do not divide.
        NotImplementedError: an encoder-decoder, layers of different shapes, layers that share or compress
            their keys and values, or layers without attention.
    """
    if isinstance(model_config, Geometry):
        return model_config
    if isinstance(model_config, (dict, str, type)) or not hasattr(model_config, "model_type"):
        raise TypeError(
            "model_geometry: expected a transformers config or a Geometry, got "
            f"{type(model_config).__name__}; pass model.config"
        )
    if hasattr(model_config, "get_text_config") and not getattr(model_config, "is_encoder_decoder", False):
        model_config = model_config.get_text_config(decoder=True)
    if not getattr(model_config, "is_heterogeneous", False):
        return _uniform_geometry(model_config, None)
    num_layers = model_config.num_hidden_layers
    layers = {_uniform_geometry(model_config.per_layer_config[i], num_layers) for i in range(num_layers)}
    if len(layers) > 1:
        found = sorted((layer.num_kv_heads, layer.head_dim) for layer in layers)
        raise NotImplementedError(
            f"model_geometry: expected layers of one shape, got {model_config.model_type} with "
            f"(num_kv_heads, head_dim) in {found}; prefixes of models whose layers differ are not supported"
        )
    return layers.pop()


def _uniform_geometry(model_config: Any, num_layers: int | None) -> Geometry:
    _refuse_other_caches(model_config)
    where = f"model_geometry of {model_config.model_type}"
    layers = num_layers or _required(model_config, where, "num_hidden_layers", "n_layer", "num_layers")
    heads = _required(model_config, where, "num_attention_heads", "n_head", "n_heads", "num_heads")
    kv_heads = _first(model_config, "num_key_value_heads", "num_kv_heads") or heads
    if getattr(model_config, "multi_query", False) and not _first(model_config, "new_decoder_architecture"):
        kv_heads = 1
    head_dim = _first(model_config, "head_dim")
    per_layer = [value for value in (heads, kv_heads, head_dim) if isinstance(value, (list, tuple))]
    if per_layer:
        raise NotImplementedError(
            f"{where}: expected the same heads in all layers, got {list(per_layer[0])}; prefixes of models "
            "whose layers differ are not supported"
        )
    heads = checked_integer(heads, "num_attention_heads", 1, where)
    kv_heads = checked_integer(kv_heads, "num_key_value_heads", 1, where)
    if heads % kv_heads:
        raise ValueError(
            f"{where}: expected num_attention_heads to be a multiple of num_key_value_heads, got {heads} and "
            f"{kv_heads}; correct the model's config"
        )
    if head_dim is None:
        hidden = _required(model_config, where, "hidden_size", "n_embd", "d_model")
        hidden = checked_integer(hidden, "hidden_size", 1, where)
        if hidden % heads:
            raise ValueError(
                f"{where}: expected hidden_size to be a multiple of num_attention_heads, got {hidden} and "
                f"{heads}; correct the model's config or give it a head_dim"
            )
        head_dim = hidden // heads
    return Geometry(layers, kv_heads, head_dim)


def _refuse_other_caches(model_config: Any) -> None:
    """Raise unless each layer caches one key and one value, of equal width, per token and head."""
    kind = getattr(model_config, "model_type", type(model_config).__name__)
    reason = None
    other_layers = set(getattr(model_config, "layer_types", None) or ()) - _ATTENTION_LAYERS
    if getattr(model_config, "is_encoder_decoder", False):
        reason = "is an encoder-decoder, which has several sites (model_sites gives the geometry of each)"
    elif getattr(model_config, "kv_lora_rank", None) is not None:
        reason = "compresses its keys and values (kv_lora_rank), so they have no common head dim"
    elif getattr(model_config, "num_kv_shared_layers", 0):
        reason = "has layers that read another layer's keys and values (num_kv_shared_layers)"
    elif getattr(model_config, "global_head_dim", None) is not None:
        reason = "has layers of different shapes (global_head_dim)"
    elif getattr(model_config, "v_head_dim", None) not in (None, getattr(model_config, "head_dim", None)):
        reason = "has values of another width than its keys (v_head_dim)"
    elif other_layers:
        reason = f"has layers without an ordinary key/value cache ({', '.join(sorted(other_layers))})"
    if reason is not None:
        raise NotImplementedError(
            "model_geometry: expected a decoder-only model with the same attention in every layer, got "
            f"{kind}: it {reason}; use another model"
        )


def _first(model_config: Any, *names: str) -> Any:
    """The first of the attributes that is there and not None."""
    return next((value for name in names if (value := getattr(model_config, name, None)) is not None), None)


def _required(model_config: Any, where: str, *names: str) -> Any:
    value = _first(model_config, *names)
    if value is None:
        raise ValueError(f"{where}: expected the config to have one of {', '.join(names)}, got none; use another model")
    return value


def split_flat(flat: Tensor, geometry: Geometry) -> tuple[Tensor, Tensor]:
    """Keys and values [L, Hkv, P, D], views of PEFT's layout [P, L · 2 · Hkv · D] as its get_prompt reads it.

    Both come from one unbind, so that the backward writes the flat gradient once.
    """
    layers, heads, dim = geometry.num_layers, geometry.num_kv_heads, geometry.head_dim
    keys, values = flat.view(flat.shape[0], layers, 2, heads, dim).unbind(2)
    return keys.permute(1, 2, 0, 3), values.permute(1, 2, 0, 3)


def join_flat(keys: Tensor, values: Tensor) -> Tensor:
    """Keys and values [L, Hkv, P, D] in PEFT's layout [P, L · 2 · Hkv · D]; undoes `split_flat`."""
    tokens = keys.shape[2]
    paired = keys.new_empty(tokens, keys.shape[0], 2, keys.shape[1], keys.shape[3])
    paired[:, :, 0] = keys.permute(2, 0, 1, 3)
    paired[:, :, 1] = values.permute(2, 0, 1, 3)
    return paired.reshape(tokens, 2 * keys.shape[0] * keys.shape[1] * keys.shape[3])


def peft_layers(num_layers: int) -> list[int]:
    """For each decoder layer of an encoder-decoder, the layer of PEFT's prefix that it reads: 2l mod L.

    PEFT doubles its list of L layers and cuts it into pieces of four (self and cross, key and value), of which the
    cross-attention's are dropped.
    """
    return [2 * layer % num_layers for layer in range(num_layers)]


def check_same_sites(prefix: ModelSites, model: ModelSites, where: str) -> None:
    """Raise ValueError if the model is of another kind than the prefix's, or has other sizes at one of its sites."""
    if prefix.is_encoder_decoder != model.is_encoder_decoder:
        kinds = ("a decoder-only model", "an encoder-decoder")
        raise ValueError(
            f"{where}: expected a prefix for {kinds[model.is_encoder_decoder]}, got one for"
            f" {kinds[prefix.is_encoder_decoder]}, with the sites {tuple(prefix.geometries)}; use the model that the"
            " prefix was made for"
        )
    for site, geometry in prefix.geometries.items():
        check_same_geometry(geometry, model.geometries[site], where, f" at the site {site!r}" * (site != "decoder"))


def check_same_geometry(prefix: Geometry, model: Geometry, where: str, which: str = "") -> None:
    """Raise ValueError naming every size in which a prefix differs from the model that is to read it."""
    differing = [
        name for name in ("num_layers", "num_kv_heads", "head_dim") if getattr(prefix, name) != getattr(model, name)
    ]
    if differing:
        wanted = ", ".join(f"{name}={getattr(model, name)}" for name in differing)
        got = ", ".join(f"{name}={getattr(prefix, name)}" for name in differing)
        raise ValueError(
            f"{where}: expected a prefix for a model with {wanted}{which}, got one with {got}; use the model that "
            "the prefix was made for, or train a prefix for this one"
        )
