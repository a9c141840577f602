"""Prefixes of several users, of different lengths, trained in one batch and used in one batch.

python examples/many_users.py [--model gpt2]
"""

import common
import torch

import prefix_fast

arguments = common.options(__doc__)
model, tokenizer = common.causal_model(arguments.model)
torch.manual_seed(1)
lengths = {"ann": 8, "bob": 20, "cem": 13}
users = {
    name: prefix_fast.Prefix(prefix_fast.PrefixConfig(length, prefix_projection=False), model.config)
    for name, length in lengths.items()
}
prefix_fast.patch(model, prefix_fast.PrefixBank(users))

# Ann wants the sentence, Bob its words in capitals, Cem the food alone.
wanted = {"ann": str, "bob": str.upper, "cem": lambda sentence: sentence.split(" serves ")[1].split()[0]}
names, pairs = [], []
for number, (source, target) in enumerate(common.PAIRS):
    name = tuple(wanted)[number % 3]
    names.append(name)
    pairs.append((source, wanted[name](target)))
batch = common.padded(common.encoded(tokenizer, pairs), tokenizer.pad_token_id)
optimizer = torch.optim.AdamW(model.prefix.parameters(), lr=0.03)
model.train()
losses = []
for _ in range(arguments.steps):
    loss = model(**batch, prefix_ids=names).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    losses.append(float(loss))
common.report(losses)

model.eval()
prompt = torch.tensor([tokenizer.encode(common.PAIRS[0][0] + "\n")] * 4)
readers = ["ann", "bob", "cem", None]  # None: the model without any prefix
tokens = model.generate(prompt, prefix_ids=readers, max_new_tokens=24, do_sample=False)
for reader, row in zip(readers, tokens, strict=True):
    print(f"{reader}: {tokenizer.decode(row[prompt.shape[1] :], skip_special_tokens=True)!r}")
