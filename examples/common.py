"""What the examples share: a few table-to-text pairs, a model by name or a tiny random one, and batches."""

import argparse
from typing import Any

import torch
from torch import Tensor

PLACES = ("Aromi", "Bibimbap House", "Clowns", "Cocum", "Cotto", "Fitzbillies", "Giraffe", "Strada")
PAIRS = [
    (f"name[{place}], area[{area}], food[{food}]", f"{place} serves {food} food in the {area}.")
    for place in PLACES
    for area, food in (("riverside", "Italian"), ("city centre", "Indian"))
]


class Bytes:
    """A tokenizer that needs no file: a token for each byte, then the end and the padding."""

    eos_token_id, pad_token_id = 256, 257

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        return list(text.encode())

    def decode(self, ids: Any, skip_special_tokens: bool = True) -> str:
        return bytes(token for token in ids if token < 256).decode(errors="replace")


def options(description: str, steps: int = 30) -> argparse.Namespace:
    """The command line of an example."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--model", default="", help="folder or hub name; by default a tiny model with random weights")
    parser.add_argument("--steps", type=int, default=steps, help="training steps")
    return parser.parse_args()


def causal_model(name: str) -> tuple[Any, Any]:
    """A causal language model and its tokenizer."""
    import transformers as hf

    if name:
        return hf.AutoModelForCausalLM.from_pretrained(name), hf.AutoTokenizer.from_pretrained(name)
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    tokens = {"vocab_size": 258, "bos_token_id": None, "eos_token_id": 256, "pad_token_id": 257}
    return hf.LlamaForCausalLM(hf.LlamaConfig(**sizes, **tokens, initializer_range=0.1)), Bytes()


def encoded(tokenizer: Any, pairs: list[tuple[str, str]] = PAIRS) -> list[dict[str, list[int]]]:
    """Source and target in one row; the target's tokens and the end carry labels."""
    rows = []
    for source, target in pairs:
        begin = tokenizer.encode(source + "\n", add_special_tokens=False)
        end = [*tokenizer.encode(target, add_special_tokens=False), tokenizer.eos_token_id]
        rows.append({"input_ids": begin + end, "labels": [-100] * len(begin) + end})
    return rows


def padded(rows: list[dict[str, list[int]]], pad: int) -> dict[str, Tensor]:
    """A batch, padded on the right."""
    width = max(len(row["input_ids"]) for row in rows)
    fill = {"input_ids": pad, "labels": -100, "attention_mask": 0}
    given = [{**row, "attention_mask": [1] * len(row["input_ids"])} for row in rows]
    return {
        name: torch.tensor([row[name] + [value] * (width - len(row[name])) for row in given])
        for name, value in fill.items()
    }


def report(losses: list[float]) -> None:
    """What was learnt, in a line."""
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f} in {len(losses)} steps")
