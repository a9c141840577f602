"""One batch whose rows read different prefixes: PEFT with one adapter after another, one prefix for all rows."""

from typing import Any

import torch
from compare import Contender, compare
from hosts import Size, base_model
from peft import PrefixTuningConfig, get_peft_model
from torch import Tensor

from prefix_fast import Prefix, PrefixBank, PrefixConfig, patch

MIXED = Size(layers=12, rows=32, tokens=8, prefix=200, new=8)
QUICK_MIXED = Size(layers=2, rows=8, tokens=4, prefix=16, new=3, vocabulary=500)
DECODE = Size(layers=3, rows=64, tokens=4, prefix=400, new=8, vocabulary=2000)
QUICK_DECODE = Size(layers=1, rows=8, tokens=4, prefix=16, new=3, vocabulary=500)


def lengths(size: Size, count: int) -> list[int]:
    """Evenly from 1 to the longest."""
    return [1 + round((size.prefix - 1) * number / (count - 1)) for number in range(count)]


def prompts(size: Size) -> Tensor:
    """[B, T]."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(1, size.vocabulary, (size.rows, size.tokens), generator=generator)


def tokens(model: Any, size: Size, ids: Tensor, **options: Any) -> Tensor:
    """Greedy generation."""
    mask = torch.ones_like(ids)
    options |= {"max_new_tokens": size.new, "min_new_tokens": size.new, "do_sample": False}
    return model.generate(input_ids=ids, attention_mask=mask, **options)


def test_mixed_batch(benchmark: Any, record: Any, quick: bool) -> None:
    size = QUICK_MIXED if quick else MIXED
    names = [f"user{number}" for number in range(8)]
    peft_model = None
    for name, length in zip(names, lengths(size, 8), strict=True):
        config = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=length, prefix_projection=False)
        if peft_model is None:
            peft_model = get_peft_model(base_model(size), config, adapter_name=name)
        else:
            peft_model.add_adapter(name, config)
    peft_model.eval()
    bank = PrefixBank()
    for name in names:
        flat = peft_model.prompt_encoder[name].embedding.weight.detach()
        bank.add(name, prefix_of(flat, base_model(size).config))
    model = patch(base_model(size).eval(), bank)
    rows = [names[row % 8] for row in range(size.rows)]
    ids = prompts(size)

    def one_adapter_after_another() -> tuple[Tensor, ...]:
        found = [torch.empty(0)] * size.rows
        for name in names:
            peft_model.set_adapter(name)
            own = [row for row in range(size.rows) if rows[row] == name]
            for row, out in zip(own, tokens(peft_model, size, ids[own]), strict=True):
                found[row] = out
        return (torch.stack(found),)

    record(
        compare(
            benchmark,
            group="bank",
            case=f"{size}, 8 prefixes of 1..P, {size.new} new tokens",
            ours=Contender("patch(model, bank)", lambda: (tokens(model, size, ids, prefix_ids=rows),)),
            rivals=[Contender("PEFT, one adapter after another", one_adapter_after_another, rounds=2)],
            rounds=1 if quick else 4,
            tolerance=0.0,
            headlines=["PEFT, one adapter after another"],
        )
    )


def test_as_many_prefixes_as_rows(benchmark: Any, record: Any, quick: bool) -> None:
    size = QUICK_DECODE if quick else DECODE
    model, shared = base_model(size).eval(), base_model(size).eval()
    sizes = lengths(size, size.rows)
    direct = [PrefixConfig(length, prefix_projection=False) for length in (*sizes, size.prefix // 2)]
    bank = PrefixBank({f"user{n}": Prefix(config, model.config) for n, config in enumerate(direct[:-1])})
    patch(model, bank)
    patch(shared, Prefix(direct[-1], shared.config))
    ids = prompts(size)
    record(
        compare(
            benchmark,
            group="bank",
            case=f"{size}, a prefix of 1..P for each row, {size.new} new tokens",
            ours=Contender("patch(model, bank)", lambda: (tokens(model, size, ids, prefix_ids=bank.names),)),
            rivals=[
                Contender("one prefix of P/2 for all rows", lambda: (tokens(shared, size, ids),), same_task=False),
            ],
            rounds=1 if quick else 6,
            tolerance=0.0,
        )
    )


def prefix_of(flat: Tensor, config: Any) -> Prefix:
    """A direct prefix of PEFT's tensor [P, L · 2 · Hkv · D]."""
    layers, heads = config.n_layer, config.n_head
    keys, values = flat.view(len(flat), layers, 2, heads, -1).permute(2, 1, 3, 0, 4)
    settings = PrefixConfig(len(flat), prefix_projection=False)
    return Prefix(settings, config, start={"decoder": (keys, values)})
