"""A PEFT prefix-tuning script, made fast by one line; its files stay PEFT's.

python examples/peft_script.py [--model gpt2]
"""

import tempfile

import common
import torch
from peft import PeftModel, PrefixTuningConfig, get_peft_model

import prefix_fast

arguments = common.options(__doc__)
base, tokenizer = common.causal_model(arguments.model)
model = get_peft_model(base, PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=20))
prefix_fast.patch(model)  # the one line

batch = common.padded(common.encoded(tokenizer), tokenizer.pad_token_id)
optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=0.03)
model.train()
losses = []
for _ in range(arguments.steps):
    loss = model(**batch).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    losses.append(float(loss))
common.report(losses)

with tempfile.TemporaryDirectory() as folder:
    model.save_pretrained(folder)
    prefix_fast.unpatch(model)
    plain = PeftModel.from_pretrained(model.get_base_model(), folder)  # PEFT alone reads what was trained
    plain.eval()
    print(f"PEFT's own loss with the saved file: {float(plain(**batch).loss):.3f}")
