"""The reference of the benchmark: the dense model of `train_step.py` in plain PyTorch, trained without DeepSpeed.

Shapes: B batch, S sequence, H heads, N head width, D model width
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


class PlainLayer(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.dense = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x_BSD: Tensor, cos_SN: Tensor, sin_SN: Tensor) -> Tensor:
        shape = (*x_BSD.shape[:2], 3, self.heads, x_BSD.shape[2] // self.heads)
        q_BHSN, k_BHSN, v_BHSN = self.qkv(self.norm1(x_BSD)).view(shape).permute(2, 0, 3, 1, 4)
        q_BHSN, k_BHSN = (t * cos_SN + rotate_half(t) * sin_SN for t in (q_BHSN, k_BHSN))
        y_BHSN = functional.scaled_dot_product_attention(q_BHSN, k_BHSN, v_BHSN, is_causal=True)
        x_BSD = x_BSD + self.dense(y_BHSN.transpose(1, 2).reshape(x_BSD.shape))
        return x_BSD + self.down(functional.gelu(self.up(self.norm2(x_BSD))))


def rotate_half(t: Tensor) -> Tensor:
    first, second = t.chunk(2, dim=-1)
    return torch.cat([-second, first], dim=-1)


class PlainGPT(nn.Module):
    def __init__(self, *, layers: int, width: int, heads: int, vocabulary: int, seq_length: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.layers = nn.ModuleList(PlainLayer(width, heads) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)
        half = width // heads // 2
        angles = torch.outer(torch.arange(seq_length).float(), 10000.0 ** (-torch.arange(half).float() / half)).repeat(1, 2)
        self.register_buffer("cos", angles.cos())
        self.register_buffer("sin", angles.sin())

    def forward(self, text: Tensor) -> Tensor:
        x_BSD = self.embedding(text[:, :-1])
        for layer in self.layers:
            x_BSD = layer(x_BSD, self.cos, self.sin)
        return functional.cross_entropy(self.head(self.norm(x_BSD)).flatten(0, 1).float(), text[:, 1:].flatten())


class PlainTraining:
    """One step is forward, backward, clipping, fused AdamW."""

    def __init__(self, model: PlainGPT) -> None:
        self.model = model
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step(self, text: Tensor) -> None:
        self.model(text).backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
