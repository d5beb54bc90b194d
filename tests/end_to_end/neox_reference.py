"""What GPT-NeoX does in a training run, said once more and independently: its data files, the order in which it reads them, its learning rate, its
weight-decay groups, around a model of Hugging Face's. Nothing here uses this project's code.

Shapes: B micro-batch; S sequence length; V vocabulary.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

SPLIT = (969.0, 30.0, 1.0)


@dataclass(frozen=True)
class Settings:
    """A run, under GPT-NeoX's names."""

    seq_length: int = 32
    train_iters: int = 50
    micro_batch: int = 2
    accumulation: int = 2
    seed: int = 1234
    lr: float = 3e-3
    min_lr: float = 3e-4
    warmup: float = 0.1
    weight_decay: float = 0.1
    clip: float = 1.0
    betas: tuple[float, float] = (0.9, 0.95)


def write_corpus(prefix: Path, documents: list[np.ndarray]) -> None:
    """<prefix>.bin and <prefix>.idx in the memory-mapped format, as 16-bit tokens."""
    sizes = np.array([len(document) for document in documents], dtype=np.int32)
    offsets = np.concatenate([[0], np.cumsum(sizes[:-1], dtype=np.int64) * 2]).astype(np.int64)
    header = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, 8, len(sizes), len(sizes) + 1)
    numbers = sizes.tobytes() + offsets.tobytes() + np.arange(len(sizes) + 1, dtype=np.int64).tobytes()
    Path(f"{prefix}.bin").write_bytes(b"".join(document.astype(np.uint16).tobytes() for document in documents))
    Path(f"{prefix}.idx").write_bytes(header + numbers)


def samples(documents: list[np.ndarray], settings: Settings) -> np.ndarray:
    """The training samples in the order in which they are read, S + 1 tokens each, the last of one being the first of the next in the text."""
    train = documents[: training_documents(len(documents))]
    length, wanted = settings.seq_length, settings.train_iters * settings.micro_batch * settings.accumulation
    tokens = sum(len(document) for document in train)
    epochs = next(epochs for epochs in range(1, 1000) if (epochs * tokens - 1) // length >= wanted)
    generator = np.random.RandomState(settings.seed)
    order = np.tile(np.arange(len(train), dtype=np.int32), epochs)
    generator.shuffle(order)
    text = np.concatenate([train[number] for number in order]).astype(np.int64)
    shuffle = np.arange((epochs * tokens - 1) // length, dtype=np.uint32)
    generator.shuffle(shuffle)
    return np.stack([text[start : start + length + 1] for start in (int(number) * length for number in shuffle[:wanted])])


def training_documents(count: int) -> int:
    """How many documents, from the first on, the split gives to training."""
    ends, total = [0], sum(SPLIT)
    for share in SPLIT:
        ends.append(ends[-1] + round(share / total * count))
    return ends[1] - (ends[-1] - count)


def learning_rate(settings: Settings, steps_done: int) -> float:
    """Linear warm-up over a share of the steps that is not rounded, then a cosine."""
    warm = settings.warmup * settings.train_iters
    if steps_done <= warm:
        return settings.lr * max(1, steps_done) / warm
    share = (steps_done - warm) / (settings.train_iters - warm)
    return settings.min_lr + (settings.lr - settings.min_lr) / 2 * (math.cos(math.pi * share) + 1)


def weight_decay_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Everything in a norm, and every bias, does not decay."""
    exempt, decayed = [], []
    for module in model.modules():
        is_norm = "norm" in type(module).__name__.lower()
        for name, parameter in module.named_parameters(recurse=False):
            (exempt if is_norm or name == "bias" else decayed).append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": exempt, "weight_decay": 0.0}]


def train(model: nn.Module, documents: list[np.ndarray], settings: Settings) -> list[float]:
    """The loss of each step: the mean over the micro-batches of the mean over their tokens."""
    optimizer = torch.optim.AdamW(weight_decay_groups(model, settings.weight_decay), lr=settings.lr, betas=settings.betas, eps=1e-8, fused=False)
    batches = micro_batches(samples(documents, settings), settings)
    model.train()
    losses = []
    for step in range(settings.train_iters):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(settings, step)
        optimizer.zero_grad()
        total = 0.0
        for _ in range(settings.accumulation):
            text = next(batches)
            loss = nn.functional.cross_entropy(model(input_ids=text[:, :-1]).logits.flatten(0, 1), text[:, 1:].flatten())
            (loss / settings.accumulation).backward()
            total += loss.item() / settings.accumulation
        nn.utils.clip_grad_norm_(model.parameters(), settings.clip)
        optimizer.step()
        losses.append(total)
    return losses


def micro_batches(ordered: np.ndarray, settings: Settings) -> Iterator[Tensor]:
    """One after the other, as they come."""
    for start in range(0, len(ordered), settings.micro_batch):
        yield torch.from_numpy(ordered[start : start + settings.micro_batch])
