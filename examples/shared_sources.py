"""Several references of each table: the table's tokens are computed once and read by all of them.

python examples/shared_sources.py [--model gpt2]
"""

import common
import torch

import prefix_fast

arguments = common.options(__doc__)
model, tokenizer = common.causal_model(arguments.model)
torch.manual_seed(1)
prefix_fast.patch(model, 20)

WORDINGS = ("{0} serves {1} food in the {2}.", "In the {2} there is {0}, with {1} food.", "{0}: {1}, {2}.")
features = []
for source, target in common.PAIRS:
    name, rest = target.split(" serves ")
    food, area = rest[:-1].split(" food in the ")
    for wording in WORDINGS:
        text = wording.format(name, food, area)
        features.append(
            {
                "source_ids": tokenizer.encode(source + "\n", add_special_tokens=False),
                "target_ids": [*tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_id],
            }
        )
batch = prefix_fast.SharedSourceCollator(tokenizer.eos_token_id)(features)
optimizer = torch.optim.AdamW(model.prefix.parameters(), lr=0.02)
model.train()
losses = []
for _ in range(arguments.steps):
    loss = model(**batch).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    losses.append(float(loss.detach()))
common.report(losses)
ordinary = sum(len(feature["source_ids"]) + len(feature["target_ids"]) for feature in features)
computed = int(batch["source_mask"].sum() + batch["target_mask"].sum())
print(f"{len(features)} rows of {len(batch['source_ids'])} sources: {computed} tokens computed instead of {ordinary}")
