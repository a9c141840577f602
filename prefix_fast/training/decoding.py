"""Generate answers to source texts with a patched (or any other) causal language model."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from prefix_fast.training.collate import RowTokenizer, collate_generation


@torch.no_grad()
def generate_texts(
    model: Any,
    rows: RowTokenizer,
    sources: Sequence[str],
    *,
    max_new_tokens: int,
    batch_size: int = 8,
    num_beams: int = 1,
    on_batch: Callable[[int], None] = lambda count: None,
) -> list[str]:
    """Greedy or beam-search continuations of the sources' rows, without special tokens, in the order of ``sources``.

    Rows are batched by length (padded on the left). ``on_batch`` is called with the number of texts done so far.
    """
    if not sources:
        raise ValueError("generate_texts: expected at least one source text, got none; pass one")
    tokenizer = rows.tokenizer
    all_ids = [rows.source_ids(source) for source in sources]
    order = sorted(range(len(sources)), key=lambda index: len(all_ids[index]))
    texts = [""] * len(sources)
    was_training = model.training
    model.eval()
    try:
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            batch = collate_generation([all_ids[index] for index in chosen], tokenizer.pad_token_id)
            inputs = {name: tensor.to(model.device) for name, tensor in batch.items()}
            output = model.generate(
                **inputs,
                max_new_tokens=max_new_tokens,
                num_beams=num_beams,
                do_sample=False,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
            new_ids = output[:, batch["input_ids"].shape[1] :]
            for index, text in zip(chosen, tokenizer.batch_decode(new_ids, skip_special_tokens=True), strict=True):
                texts[index] = text.strip()
            on_batch(start + len(chosen))
    finally:
        model.train(was_training)
    return texts
