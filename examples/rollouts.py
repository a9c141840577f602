"""Policy gradients on a prefix, in the manner of GRPO: several completions of each prompt, one against another.

A prompt's tokens are computed once for all of its completions, whose reward is their share of lower-case letters.

python examples/rollouts.py [--model gpt2]
"""

import common
import torch

import prefix_fast

PROMPTS, SAMPLES, TOKENS = 4, 8, 16

arguments = common.options(__doc__)
model, tokenizer = common.causal_model(arguments.model)
torch.manual_seed(1)
prefix_fast.patch(model, prefix_fast.PrefixConfig(20, prefix_projection=False))
collate = prefix_fast.SharedSourceCollator(tokenizer.eos_token_id)
prompts = [tokenizer.encode(source + "\n", add_special_tokens=False) for source, _ in common.PAIRS[:PROMPTS]]


def rollouts():
    """Features of sampled completions, and the reward of each, [prompts, samples]."""
    features, rewards = [], []
    model.eval()
    for prompt in prompts:
        rows = model.generate(
            torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long), do_sample=True,
            num_return_sequences=SAMPLES, max_new_tokens=TOKENS, pad_token_id=tokenizer.eos_token_id,
        )  # fmt: skip
        for row in rows[:, len(prompt) :].tolist():
            end = row.index(tokenizer.eos_token_id) + 1 if tokenizer.eos_token_id in row else len(row)
            text = tokenizer.decode(row[:end], skip_special_tokens=True)
            rewards.append(sum("a" <= letter <= "z" for letter in text) / end)
            features.append({"source_ids": prompt, "target_ids": row[:end]})
    model.train()
    return features, torch.tensor(rewards).view(PROMPTS, SAMPLES)


optimizer = torch.optim.AdamW(model.prefix.parameters(), lr=0.1)
losses = []
for _ in range(arguments.steps):
    features, rewards = rollouts()
    advantages = (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-4)
    output = model(**collate(features), per_token_logps=True)
    counts = torch.tensor([len(feature["target_ids"]) for feature in features])
    loss = -(advantages.flatten().repeat_interleave(counts) * output.per_token_logps).mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    losses.append(1 - float(rewards.mean()))  # what a completion misses of the highest reward
common.report(losses)
print(f"reward {1 - losses[0]:.2f} -> {1 - losses[-1]:.2f}, {SAMPLES} completions of each of {PROMPTS} prompts")
