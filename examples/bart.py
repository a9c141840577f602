"""BART with prefixes before the encoder's tokens, the decoder's, and in the cross-attention, as in the paper.

python examples/bart.py [--model facebook/bart-base]
"""

import common
import torch
import transformers as hf

import prefix_fast

arguments = common.options(__doc__)
if arguments.model:
    model = hf.BartForConditionalGeneration.from_pretrained(arguments.model)
    tokenizer = hf.AutoTokenizer.from_pretrained(arguments.model)
else:
    torch.manual_seed(0)
    sizes = {
        f"{part}_{name}": size
        for part in ("encoder", "decoder")
        for name, size in (("layers", 2), ("attention_heads", 4))
    }
    tokens = {"bos_token_id": 256, "eos_token_id": 256, "pad_token_id": 257, "decoder_start_token_id": 256}
    config = hf.BartConfig(vocab_size=258, d_model=64, **sizes, **tokens, forced_eos_token_id=None, init_std=0.1)
    model, tokenizer = hf.BartForConditionalGeneration(config), common.Bytes()
prefix_fast.patch(model, prefix_fast.PrefixConfig(12, sites=("encoder", "decoder", "cross")))

sources = [{"input_ids": ids, "labels": ids} for ids in (tokenizer.encode(source) for source, _ in common.PAIRS)]
targets = [
    {"input_ids": ids, "labels": ids}
    for ids in ([*tokenizer.encode(t), tokenizer.eos_token_id] for _, t in common.PAIRS)
]
batch = common.padded(sources, tokenizer.pad_token_id)
batch["labels"] = common.padded(targets, tokenizer.pad_token_id)["labels"]
optimizer = torch.optim.AdamW(model.prefix.parameters(), lr=0.01)
model.train()
losses = []
for _ in range(arguments.steps):
    loss = model(**batch).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    losses.append(float(loss))
common.report(losses)

model.eval()
source = {name: batch[name][:2] for name in ("input_ids", "attention_mask")}
for row in model.generate(**source, num_beams=4, max_new_tokens=24):
    print(repr(tokenizer.decode(row.tolist(), skip_special_tokens=True)))
