"""Direct preference optimisation of a prefix: the preferred and the other answer read one computation of the prompt.

The reference is the model without its prefix.

python examples/dpo.py [--model gpt2]
"""

import common
import torch

import prefix_fast

BETA = 0.1

arguments = common.options(__doc__)
model, tokenizer = common.causal_model(arguments.model)
torch.manual_seed(1)

features = []
for source, target in common.PAIRS:
    for answer in (target, target.upper()):  # the preferred one first
        features.append(
            {
                "source_ids": tokenizer.encode(source + "\n", add_special_tokens=False),
                "target_ids": [*tokenizer.encode(answer, add_special_tokens=False), tokenizer.eos_token_id],
            }
        )
batch = prefix_fast.SharedSourceCollator(tokenizer.eos_token_id)(features)
counts = [len(feature["target_ids"]) for feature in features]


def preferences():
    """How much more probable each preferred answer is than the other: [pairs], a logarithm."""
    logps = model(**batch, per_token_logps=True).per_token_logps
    chosen, rejected = torch.stack([part.sum() for part in logps.split(counts)]).view(-1, 2).unbind(1)
    return chosen - rejected


prefix_fast.patch(model, 0)
with torch.no_grad():
    reference = preferences()
prefix_fast.patch(model, 20)
optimizer = torch.optim.AdamW(model.prefix.parameters(), lr=0.0005)
model.train()
losses = []
for _ in range(arguments.steps):
    margins = BETA * (preferences() - reference)
    loss = -torch.nn.functional.logsigmoid(margins).mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    losses.append(float(loss.detach()))
common.report(losses)
print(f"{int((margins > 0).sum())} of {len(margins)} answers are preferred more than by the model without the prefix")
