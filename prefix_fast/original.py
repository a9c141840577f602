"""Weights of the original Prefix-Tuning code: one embedding and one MLP for each site, under its names.

    decoder (GPT-2's and BART's own tokens)   wte.weight       control_trans.{0,2}.{weight,bias}
    encoder                                   wte_enc.weight   control_trans_enc.{0,2}.{weight,bias}
    cross                                     wte2.weight      control_trans2.{0,2}.{weight,bias}

They are the parameters of a reparametrised Prefix, in one order of layers, keys, values and heads: names are all that
changes. Source: Li & Liang 2021 (arXiv 2101.00190), github.com/XiangLisaLi/PrefixTuning.
"""

from collections.abc import Mapping

from torch import Tensor

from prefix_fast.parametrisation import PrefixConfig

NAMES = {
    "encoder": ("wte_enc", "control_trans_enc"),
    "decoder": ("wte", "control_trans"),
    "cross": ("wte2", "control_trans2"),
}
# Where a checkpoint of the original training script has the prefix and the frozen model.
_OURS, _FROZEN = "model.", "seq2seq_model."


def _renamed(site: str) -> dict[str, str]:
    """Its name there → ours, of each parameter of a site."""
    embedding, transform = NAMES[site]
    parts = {
        f"{transform}.{layer}.{kind}": f"transform.{layer}.{kind}" for layer in (0, 2) for kind in ("weight", "bias")
    }
    names = {f"{embedding}.weight": "embedding.weight", **parts}
    return {theirs: f"sites.{site}.{ours}" for theirs, ours in names.items()}


def read(state_dict: Mapping[str, Tensor]) -> tuple[PrefixConfig, dict[str, Tensor]]:
    """What the weights describe, and a reparametrised Prefix's state_dict.

    Raises:
        ValueError: a site with parameters missing, sites of different lengths or widths, names of something else.
        NotImplementedError: the deeper MLP of the original code.
    """
    where = "Prefix.from_original"
    given = {name.removeprefix(_OURS): state_dict[name] for name in state_dict if not name.startswith(_FROZEN)}
    sites = [site for site, (embedding, _) in NAMES.items() if f"{embedding}.weight" in given]
    if any(f"{transform}.4.weight" in given for _, transform in NAMES.values()):
        raise NotImplementedError(
            f"{where}: expected an MLP of two layers, got the deeper one of the original code (control_trans.4); it"
            " cannot be read"
        )
    names = {theirs: ours for site in sites for theirs, ours in _renamed(site).items()}
    missing, others = sorted(set(names) - set(given)), sorted(set(given) - set(names))
    if not sites or missing or others:
        wanted = "wte.weight and control_trans.{0,2}.{weight,bias} (with _enc: encoder, with 2: cross-attention)"
        raise ValueError(
            f"{where}: expected {wanted}, got the others {others[:5]}, without {missing or ['wte.weight']}"
        )
    sizes = {(len(given[f"{e}.weight"]), len(given[f"{t}.0.weight"])) for e, t in (NAMES[site] for site in sites)}
    if len(sizes) > 1:
        raise ValueError(f"{where}: expected one length and one width of the MLPs, got (P, width) in {sorted(sizes)}")
    ((tokens, hidden),) = sizes
    config = PrefixConfig(tokens, encoder_hidden_size=hidden, sites=tuple(sites))
    return config, {ours: given[theirs] for theirs, ours in names.items()}


def written(parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A reparametrised Prefix's state_dict under the original names.

    Raises:
        NotImplementedError: a direct prefix, or one that starts from given keys and values.
    """
    names = {ours: theirs for site in NAMES for theirs, ours in _renamed(site).items()}
    others = sorted(set(parameters) - set(names))
    if others:
        raise NotImplementedError(
            "Prefix.original_state_dict: expected a reparametrised prefix without given keys and values, which is what"
            f" the original code has, got one with {others[0]}; save_pretrained writes it"
        )
    return {names[ours]: tensor for ours, tensor in parameters.items()}
