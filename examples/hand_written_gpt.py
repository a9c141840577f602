"""A GPT written by hand, frozen, that learns prefixes through PrefixAttention in a plain PyTorch loop.

python examples/hand_written_gpt.py
"""

import common
import torch
from torch import Tensor, nn
from torch.nn import functional

from prefix_fast import PrefixAttention

WIDTH, HEADS, LAYERS, VIRTUAL = 64, 4, 2, 20


class Block(nn.Module):
    """Attention to the prefix and to the tokens up to one's own, then an MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2))
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.attention = PrefixAttention(VIRTUAL, HEADS, WIDTH // HEADS)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        rows, tokens, _ = x.shape
        qkv = self.qkv(self.norms[0](x)).view(rows, tokens, 3, HEADS, WIDTH // HEADS).permute(2, 0, 3, 1, 4)
        attended = self.attention(*qkv.unbind(0), key_mask=mask, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).reshape(rows, tokens, WIDTH))
        return x + self.mlp(self.norms[1](x))


class GPT(nn.Module):
    """Token and position embeddings, blocks, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(258, WIDTH), nn.Embedding(128, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.head = nn.Linear(WIDTH, 258, bias=False)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        x = self.words(ids) + self.places(torch.arange(ids.shape[1]))
        for block in self.blocks:
            x = block(x, mask)
        return self.head(x)


arguments = common.options(__doc__)
torch.manual_seed(0)
model = GPT()
prefixes = [p for name, p in model.named_parameters() if ".attention." in name]
model.requires_grad_(False)
for parameter in prefixes:
    parameter.requires_grad_(True)
batch = common.padded(common.encoded(common.Bytes()), common.Bytes.pad_token_id)
optimizer = torch.optim.AdamW(prefixes, lr=0.05)
losses = []
for _ in range(arguments.steps):
    logits = model(batch["input_ids"], batch["attention_mask"].bool())
    loss = functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    losses.append(float(loss))
common.report(losses)
