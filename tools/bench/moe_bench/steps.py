"""Whole training steps: of our engine as users run it, and of Hugging Face's Mixtral. One step is forward, backward, clipping and AdamW."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from megatron.kernels.backends import OPS
from megatron.kernels.heap import systems_heap

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
OURS = {"fp32": "fp32", "bf16": "bfloat16"}
RATE = 1e-4
WEIGHT_DECAY, BETAS, BALANCE = 0.01, (0.9, 0.999), 0.001


class Shape(NamedTuple):
    """A Mixtral-like model and its batch."""

    layers: int = 8
    width: int = 512
    hidden: int = 1024
    experts: int = 8
    top_k: int = 2
    heads: int = 8
    vocabulary: int = 8192
    sequences: int = 4
    length: int = 512

    @property
    def tokens(self) -> int:
        """Of a step."""
        return self.sequences * self.length

    def text(self, tokens: int | None = None) -> Tensor:
        """Sequences of one token more than the model reads; shorter or fewer where `tokens` are less than a step's (None: all)."""
        length = min(self.length, tokens or self.tokens)
        return torch.randint(self.vocabulary, ((tokens or self.tokens) // length, max(2, length) + 1))

    def sentence(self) -> str:
        """For a reader of the table."""
        return (
            f"Model: {self.layers} layers, d={self.width}, F={self.hidden}, E={self.experts}, K={self.top_k}, {self.heads} heads, "
            f"vocabulary {self.vocabulary}, {self.sequences}x{self.length} tokens; AdamW, clipping."
        )


FULL, QUICK, TINY = Shape(), Shape(layers=2, sequences=2, length=256), Shape(2, 32, 64, 4, 2, 2, 128, 2, 16)
LORES = {"moe_expert_type": "structmoe", "moe_num_lores": 16, "moe_lore_rank": 32, "moe_lore_top_k": 1}
"""Half as many parameters again in every expert of `FULL`, as have 12 experts instead of 8."""


class Side(NamedTuple):
    """One way to train."""

    step: Callable[[Tensor], Any]
    parameters: int


def engine_side(shape: Shape, precision: str, **more: Any) -> Side:
    """Our engine; `more` are keys of the configuration."""
    from megatron.config import config_from_dict

    model = {
        "num_layers": shape.layers,
        "hidden_size": shape.width,
        "num_attention_heads": shape.heads,
        "intermediate_size": shape.hidden,
        "seq_length": shape.length,
        "max_position_embeddings": shape.length,
        "activation": "swiglu",
        "norm": "rmsnorm",
        "pos_emb": "rotary",
        "no_weight_tying": True,
        "use_bias_in_attn_linear": False,
        "use_bias_in_mlp": False,
    }
    moe = {"moe_num_experts": shape.experts, "moe_top_k": shape.top_k, "moe_router_type": "topk", "moe_losses": {"load_balance": BALANCE}}
    run = {
        "train_iters": 1000,
        "train_micro_batch_size_per_gpu": shape.sequences,
        "optimizer": {"type": "AdamW", "params": {"lr": RATE, "betas": list(BETAS), "eps": 1e-8}},
        "weight_decay": WEIGHT_DECAY,
        "gradient_clipping": 1.0,
        "precision": OURS[precision],
        "zero_optimization": {"stage": 0},
    }
    return engine_of(config_from_dict({**model, **moe, **run, **more}), shape.vocabulary)


def engine_of(config: Any, vocabulary: int) -> Side:
    """The engine of a configuration; a step returns its metrics."""
    from megatron.model.gpt import build_model
    from megatron.training.engine import build_engine
    from megatron.training.step import take_step

    engine = build_engine(config, build_model(config.model, config.moe, vocabulary, seed=1), world_size=1)
    settings = {"learning_rate": config.optimizer.optimizer.params.lr, "masked_token": None, "before_update": lambda: None}

    def step(text: Tensor) -> Any:
        return take_step(engine, itertools.repeat({"text": text}), **settings)

    return Side(step, sum(p.numel() for p in engine.module.parameters()))


def quickstart_side(repository: Path, implementation: str) -> tuple[Side, int, int]:
    """(the engine of configs/quickstart.yml with one implementation for all ops, sequences, length)."""
    from megatron.config.loader import load_config

    backends = ", ".join(f"{name}: {implementation}" for name in OPS)
    config = load_config([repository / "configs/quickstart.yml"], [f"kernel_backends={{{backends}}}"]).config
    return engine_of(config, 8192), config.training.train_micro_batch_size_per_gpu, config.model.seq_length


class HuggingFace:
    """MixtralForCausalLM with torch's fused AdamW."""

    def __init__(self, shape: Shape, weights: str) -> None:
        """`weights`: the precision of the weights and of what the optimizer keeps."""
        from transformers import MixtralConfig, MixtralForCausalLM

        model = {"hidden_size": shape.width, "intermediate_size": shape.hidden, "num_hidden_layers": shape.layers, "vocab_size": shape.vocabulary}
        heads = {"num_attention_heads": shape.heads, "num_key_value_heads": shape.heads, "max_position_embeddings": shape.length}
        moe = {"num_local_experts": shape.experts, "num_experts_per_tok": shape.top_k, "output_router_logits": True, "router_aux_loss_coef": BALANCE}
        self.model = MixtralForCausalLM._from_config(MixtralConfig(**model, **heads, **moe), dtype=DTYPES[weights]).train()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=RATE, betas=BETAS, weight_decay=WEIGHT_DECAY, fused=True)

    def side(self, implementation: str, *, autocast: bool = False) -> Side:
        """With one of its implementations of the experts. `autocast`: products in bf16 with weights as they are."""

        @systems_heap()
        def step(text: Tensor) -> float:
            self.model.set_experts_implementation(implementation)
            tokens = text[:, :-1]
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                loss = self.model(input_ids=tokens, labels=tokens).loss
            loss.backward()
            norm = nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad()
            return float(norm)

        return Side(step, sum(p.numel() for p in self.model.parameters()))


HUGGING_FACE: Mapping[str, tuple[str, bool, tuple[str, ...]]] = {
    "Hugging Face grouped_mm": ("grouped_mm", False, ("fp32", "bf16")),
    "Hugging Face eager": ("eager", False, ("fp32", "bf16")),
    "Hugging Face grouped_mm, autocast": ("grouped_mm", True, ("bf16",)),
    "Hugging Face eager, autocast": ("eager", True, ("bf16",)),
}
"""Name -> (implementation of the experts, whether the weights are fp32 and the products bf16, the precisions of the table that it belongs to).

Not here: `batched_mm` copies an expert's weights for every row (8 GB a layer at this shape), `deepgemm` and `sonicmoe` need a GPU.
"""


def huggingface_side(shape: Shape, precision: str, name: str, models: dict[str, HuggingFace]) -> Side:
    """`models` keeps the models by their precision: the implementations share them. Its memory is malloc's, as in a process of its own."""
    implementation, autocast, _ = HUGGING_FACE[name]
    weights = "fp32" if autocast else precision
    if weights not in models:
        with systems_heap():
            models[weights] = HuggingFace(shape, weights)
    return models[weights].side(implementation, autocast=autocast)
