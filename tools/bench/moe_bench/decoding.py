"""A Mixtral-like model that generates, ours and transformers' with the same weights: seconds of a token, and the bytes that a token reads."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron.config.model import ModelConfig
from megatron.config.moe import MoEConfig
from megatron.inference.model import Decoding, ReadyModel
from megatron.inference.runner import Runner, TextState, build_runner
from megatron.model import GPT, build_model, choose_implementations

LIBRARY = ("eager", "batched_mm", "grouped_mm")
"""transformers' ways to compute experts."""


@dataclass(frozen=True)
class DecodeShape:
    """A Mixtral-like model."""

    hidden: int
    layers: int
    width: int
    heads: int
    kv_heads: int
    vocabulary: int
    experts: int = 8
    top_k: int = 2
    context: int = 2304

    def config(self) -> tuple[ModelConfig, MoEConfig]:
        """Ours."""
        model = ModelConfig(
            num_layers=self.layers,
            hidden_size=self.hidden,
            num_attention_heads=self.heads,
            num_kv_heads=self.kv_heads,
            intermediate_size=self.width,
            seq_length=self.context,
            max_position_embeddings=self.context,
            norm="rmsnorm",
            pos_emb="rotary",
            activation="swiglu",
            no_weight_tying=True,
            use_bias_in_attn_linear=False,
        )
        return model, MoEConfig(moe_num_experts=self.experts, moe_top_k=self.top_k, moe_router_type="topk", moe_normalize_top_k=True)

    def active(self) -> int:
        """Numbers that a token reads: attention, router, its experts, the head. (The embeddings' table gives one row.)"""
        head = self.hidden // self.heads
        attention = 2 * self.hidden * self.hidden + 2 * self.hidden * self.kv_heads * head
        return self.layers * (attention + self.experts * self.hidden + self.top_k * 3 * self.hidden * self.width) + self.vocabulary * self.hidden


FULL = DecodeShape(1024, 18, 1536, 16, 16, 50304)
QUICK = DecodeShape(256, 4, 512, 4, 2, 4096)


class NumberTokenizer:
    """Tokens without text."""

    eod = None

    def __init__(self, vocabulary: int) -> None:
        self.vocab_size = vocabulary


def build_ours(shape: DecodeShape, dtype: torch.dtype) -> GPT:
    """The model, with new weights."""
    model, moe = shape.config()
    gpt = build_model(model, moe, shape.vocabulary, seed=0, dtype=dtype)
    choose_implementations(model, moe, gpt)
    return gpt.eval().requires_grad_(False)


def runner_of(shape: DecodeShape, gpt: GPT, decoding: Decoding) -> Runner:
    """What generates with it."""
    tokenizer: Any = NumberTokenizer(shape.vocabulary)
    return build_runner(ReadyModel(gpt, tokenizer, shape.config()[0], torch.device("cpu"), Path("benchmark"), None, (), decoding))


def build_theirs(shape: DecodeShape, gpt: GPT) -> Any:
    """MixtralForCausalLM with the same weights (the same memory where the layout is the same)."""
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.width,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        num_local_experts=shape.experts,
        num_experts_per_tok=shape.top_k,
        max_position_embeddings=shape.context,
        rope_theta=10000.0,
        rms_norm_eps=shape.config()[0].rms_norm_epsilon,
        tie_word_embeddings=False,
    )
    dtype = next(gpt.parameters()).dtype
    with torch.device("meta"):
        model = MixtralForCausalLM(config).to(dtype)
    model.load_state_dict(_their_weights(shape, gpt), strict=True, assign=True)
    rotary = model.model.rotary_emb  # its frequencies are no weights
    model.model.rotary_emb = type(rotary)(config)
    return model.eval().requires_grad_(False)


def _their_weights(shape: DecodeShape, gpt: GPT) -> dict[str, Tensor]:
    ours, rows = gpt.state_dict(), shape.hidden // shape.heads * shape.kv_heads
    weights = {"model.embed_tokens.weight": ours["sequential.0.word_embeddings.weight"]}
    for layer in range(shape.layers):
        old, new = f"sequential.{layer + 2}", f"model.layers.{layer}"
        parts = _projections(ours[f"{old}.attention.query_key_value.weight"], shape, rows)
        weights |= {f"{new}.self_attn.{name}_proj.weight": part for name, part in zip("qkv", parts, strict=True)}
        weights[f"{new}.self_attn.o_proj.weight"] = ours[f"{old}.attention.dense.weight"]
        weights[f"{new}.input_layernorm.weight"] = ours[f"{old}.input_layernorm.scale"]
        weights[f"{new}.post_attention_layernorm.weight"] = ours[f"{old}.post_attention_layernorm.scale"]
        weights[f"{new}.mlp.gate.weight"] = ours[f"{old}.mlp.router.layer.weight"]
        up, gate, down = (ours[f"{old}.mlp.experts.mlp.{name}"].view(shape.experts, shape.width, shape.hidden) for name in ("w1", "w3", "w2"))
        weights[f"{new}.mlp.experts.gate_up_proj"] = torch.cat([gate, up], 1)
        weights[f"{new}.mlp.experts.down_proj"] = down.transpose(1, 2).contiguous()
    weights["model.norm.weight"] = ours[f"sequential.{shape.layers + 3}.norm.scale"]
    weights["lm_head.weight"] = ours[f"sequential.{shape.layers + 4}.final_linear.weight"]
    return weights


def _projections(fused: Tensor, shape: DecodeShape, rows: int) -> Sequence[Tensor]:
    """Queries, keys and values: head by head where there are as many of each."""
    if shape.heads != shape.kv_heads:
        return fused.split([shape.hidden, rows, rows])
    by_head = fused.view(shape.heads, 3, -1, shape.hidden)
    return [by_head[:, part].reshape(shape.hidden, shape.hidden) for part in range(3)]


def our_seconds(runner: Runner, prompts: Sequence[Sequence[int]], tokens: int) -> tuple[float, list[list[int]]]:
    """(Seconds of a step that adds one token to each text, the greedy tokens of each text.)"""
    states: list[TextState] = []
    answers: list[list[int]] = []
    for prompt in prompts:
        state = runner.open(len(prompt) + tokens)
        answers.append([int(runner.prefill(state, prompt).argmax())])
        states.append(state)
    started = time.perf_counter()
    for _ in range(tokens - 1):
        logits_NV = runner.decode(states, [answer[-1] for answer in answers])
        for answer, token in zip(answers, logits_NV.argmax(-1).tolist(), strict=True):
            answer.append(token)
    return (time.perf_counter() - started) / (tokens - 1), answers


@torch.inference_mode()
def their_seconds(model: Any, prompt: Sequence[int], tokens: int) -> tuple[float, list[int]]:
    """The same by `generate` for one text: the time of the prompt, taken from a generation of one token, does not count."""
    given = torch.tensor([prompt])
    settings = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "attention_mask": torch.ones_like(given)}

    def generate(count: int) -> tuple[float, Tensor]:
        started = time.perf_counter()
        output = model.generate(given, max_new_tokens=count, min_new_tokens=count, **settings)
        return time.perf_counter() - started, output

    first, _ = generate(1)
    whole, output = generate(tokens)
    return (whole - first) / (tokens - 1), output[0, len(prompt) :].tolist()


def read_bandwidth(gigabytes: float = 0.5, rounds: int = 5) -> float:
    """Bytes a second that all threads read from memory: the best of several sums over numbers that no cache holds."""
    numbers = torch.ones(int(gigabytes * 2**28))
    times = []
    for _ in range(rounds):
        started = time.perf_counter()
        numbers.sum()
        times.append(time.perf_counter() - started)
    return numbers.numel() * 4 / min(times)


def medians(rounds: Iterable[dict[str, float]]) -> dict[str, float]:
    """The median of each side over the rounds in which it ran."""
    taken: dict[str, list[float]] = {}
    for one in rounds:
        for name, seconds in one.items():
            taken.setdefault(name, []).append(seconds)
    return {name: statistics.median(times) for name, times in taken.items()}
