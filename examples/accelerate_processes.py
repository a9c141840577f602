"""accelerate with several processes, each with its own rows; the prefix's gradients are averaged over them.

torchrun --nproc_per_node 2 examples/accelerate_processes.py [--model gpt2]
"""

import common
import torch
from accelerate import Accelerator

import prefix_fast

arguments = common.options(__doc__)
accelerator = Accelerator(cpu=True)
model, tokenizer = common.causal_model(arguments.model)
torch.manual_seed(1)
prefix_fast.patch(model, 20)
optimizer = torch.optim.AdamW(model.prefix.parameters(), lr=0.02)
loader = torch.utils.data.DataLoader(
    common.encoded(tokenizer), batch_size=4, collate_fn=lambda rows: common.padded(rows, tokenizer.pad_token_id)
)
model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
model.train()
losses: list[float] = []
while len(losses) < arguments.steps:
    for batch in loader:
        loss = model(**batch).loss
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(accelerator.gather(loss.detach()).mean()))
totals = torch.stack([p.detach().double().sum() for p in accelerator.unwrap_model(model).prefix.parameters()]).sum()
everywhere = accelerator.gather(totals)
if accelerator.is_main_process:
    common.report(losses[: arguments.steps])
    same = bool((everywhere == everywhere[0]).all())
    print(f"{accelerator.num_processes} processes, the same prefix in each: {same}")
