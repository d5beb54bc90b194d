"""From the same weights, data and settings as GPT-NeoX the loss of every step is the same: 50 steps in fp32 against Hugging Face's models in a loop
of their own. The weights go through the files that GPT-NeoX writes, whole and in parts, with today's names and with old ones."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.checkpoint.upstream import cut_for_rank, head, renamed, with_llama_names, write_layers, write_sequential
from tests.end_to_end import neox_reference
from tests.end_to_end.neox_reference import Settings
from tests.training.runs import train_losses

ALLOWED = 1e-5
VOCABULARY, WIDTH, LAYERS, HEADS, FFN, SETTINGS = 512, 64, 2, 4, 96, Settings()


@pytest.fixture(scope="module")
def documents() -> list[np.ndarray]:
    """Forty short texts in which a token often follows from the one before it."""
    generator = np.random.default_rng(5)
    follower = generator.permutation(100)
    texts = []
    for length in generator.integers(20, 140, size=40):
        text = [int(generator.integers(100))]
        while len(text) < length:
            text.append(int(follower[text[-1]]) if generator.random() < 0.8 else int(generator.integers(100)))
        texts.append(np.array(text))
    return texts


def run(values: dict[str, Any], folder: Path, documents: list[np.ndarray]) -> list[float]:
    """Our losses, from the checkpoint that lies in <folder>/theirs."""
    neox_reference.write_corpus(folder / "corpus", documents)
    settings = {
        "data_path": str(folder / "corpus"),
        "split": "969, 30, 1",
        "tokenizer_type": "CharLevelTokenizer",
        "load": str(folder / "theirs"),
        "finetune": True,
        "num_layers": LAYERS,
        "hidden_size": WIDTH,
        "num_attention_heads": HEADS,
        "seq_length": SETTINGS.seq_length,
        "max_position_embeddings": SETTINGS.seq_length,
        "pos_emb": "rotary",
        "no_weight_tying": True,
        "optimizer": {"type": "Adam", "params": {"lr": SETTINGS.lr, "betas": list(SETTINGS.betas), "eps": 1e-8}},
        "min_lr": SETTINGS.min_lr,
        "lr_decay_style": "cosine",
        "lr_decay_iters": SETTINGS.train_iters,
        "warmup": SETTINGS.warmup,
        "weight_decay": SETTINGS.weight_decay,
        "gradient_clipping": SETTINGS.clip,
        "train_iters": SETTINGS.train_iters,
        "train_micro_batch_size_per_gpu": SETTINGS.micro_batch,
        "gradient_accumulation_steps": SETTINGS.accumulation,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "eval_iters": 0,
        "num_workers": 0,
        "metrics_file": str(folder / "metrics.jsonl"),
    }
    return train_losses({**settings, **values})


def args(tensor_parallel: int) -> dict[str, Any]:
    return {
        "num_layers": LAYERS,
        "hidden_size": WIDTH,
        "num_attention_heads": HEADS,
        "max_position_embeddings": SETTINGS.seq_length,
        "make_vocab_size_divisible_by": 128,
        "padded_vocab_size": VOCABULARY,
        "tokenizer_type": "CharLevelTokenizer",
        "model_parallel_size": tensor_parallel,
    }


def check_same(ours: list[float], theirs: list[float]) -> None:
    differences = [abs(a - b) for a, b in zip(ours, theirs, strict=True)]
    assert len(differences) == SETTINGS.train_iters
    assert max(differences) <= ALLOWED, f"step {int(np.argmax(differences)) + 1}: {max(differences):.2e}"
    assert theirs[-1] < 0.7 * theirs[0], "the model learned something that could have been different"


def gpt_neox(*, parallel: bool) -> nn.Module:
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    torch.manual_seed(3)
    config = GPTNeoXConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        intermediate_size=4 * WIDTH,
        max_position_embeddings=SETTINGS.seq_length,
        rotary_pct=0.25,
        hidden_act="gelu",
        layer_norm_eps=1e-5,
        use_parallel_residual=parallel,
        tie_word_embeddings=False,
        attention_dropout=0.0,
        hidden_dropout=0.0,
    )
    return lively(GPTNeoXForCausalLM(config))


def llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(4)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=2,
        intermediate_size=FFN,
        max_position_embeddings=SETTINGS.seq_length,
        rms_norm_eps=1e-6,
        hidden_act="silu",
        tie_word_embeddings=False,
    )
    return lively(LlamaForCausalLM(config))


def lively(model: nn.Module) -> nn.Module:
    """Random weights everywhere: biases and norms as well, which would hide a mistake at 0 and 1."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
            elif "embed" not in name:
                parameter.mul_(3.0)
    return model


def from_gpt_neox(model: nn.Module) -> dict[str, Tensor]:
    """GPT-NeoX's names for Hugging Face's."""
    outer = {
        "gpt_neox.embed_in.weight": "sequential.0.word_embeddings.weight",
        "gpt_neox.final_layer_norm.weight": f"sequential.{LAYERS + 3}.norm.weight",
        "gpt_neox.final_layer_norm.bias": f"sequential.{LAYERS + 3}.norm.bias",
        **dict.fromkeys(("embed_out.weight", "lm_head.weight"), f"sequential.{LAYERS + 4}.final_linear.weight"),
    }

    def name(theirs: str) -> str:
        if theirs in outer:
            return outer[theirs]
        _, _, layer, rest = theirs.split(".", 3)
        return f"sequential.{int(layer) + 2}.{rest.replace('dense_h_to_4h', 'linear1').replace('dense_4h_to_h', 'linear2')}"

    return {name(theirs): tensor.clone() for theirs, tensor in model.state_dict().items() if "rotary" not in theirs}


def from_llama(model: nn.Module) -> dict[str, Tensor]:
    theirs = model.state_dict()
    state = {
        "sequential.0.word_embeddings.weight": theirs["model.embed_tokens.weight"],
        f"sequential.{LAYERS + 3}.norm.scale": theirs["model.norm.weight"],
        f"sequential.{LAYERS + 4}.final_linear.weight": theirs["lm_head.weight"],
    }
    for layer in range(LAYERS):
        old, new = f"model.layers.{layer}.", f"sequential.{layer + 2}."
        state |= {
            f"{new}input_layernorm.scale": theirs[f"{old}input_layernorm.weight"],
            f"{new}post_attention_layernorm.scale": theirs[f"{old}post_attention_layernorm.weight"],
            f"{new}attention.query_key_value.weight": torch.cat([theirs[f"{old}self_attn.{part}_proj.weight"] for part in "qkv"]),
            f"{new}attention.dense.weight": theirs[f"{old}self_attn.o_proj.weight"],
            f"{new}mlp.linear1.weight": torch.cat([theirs[f"{old}mlp.{part}_proj.weight"] for part in ("up", "gate")]),
            f"{new}mlp.linear2.weight": theirs[f"{old}mlp.down_proj.weight"],
        }
    return {name: tensor.clone() for name, tensor in state.items()}


def old_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return renamed(state, lambda name: name.replace("linear1", "dense_h_to_4h").replace("linear2", "dense_4h_to_h"))


@pytest.mark.parametrize(("write", "changed"), [(write_sequential, dict), (write_layers, old_names)], ids=["one file", "layer files, old names"])
def test_gpt_neox_with_parallel_residuals(
    tmp_path: Path,
    documents: list[np.ndarray],
    write: Callable[..., Path],
    changed: Callable[[dict[str, Tensor]], dict[str, Tensor]],
) -> None:
    model = gpt_neox(parallel=True)
    write(tmp_path / "theirs", [changed(from_gpt_neox(model))], head(7, args(1)))
    ours = run({"gpt_j_residual": True, "rotary_pct": 0.25}, tmp_path, documents)
    check_same(ours, neox_reference.train(model, documents, SETTINGS))


def test_gpt_neox_with_sequential_residuals_from_two_processes(tmp_path: Path, documents: list[np.ndarray]) -> None:
    model = gpt_neox(parallel=False)
    parts = [cut_for_rank(from_gpt_neox(model), rank, 2, queries=WIDTH, kv=WIDTH, gated=False) for rank in range(2)]
    write_layers(tmp_path / "theirs", parts, head(7, args(2)), stages=2)
    check_same(run({"rotary_pct": 0.25}, tmp_path, documents), neox_reference.train(model, documents, SETTINGS))


def test_a_llama_with_old_names_from_two_processes(tmp_path: Path, documents: list[np.ndarray]) -> None:
    model = llama()
    parts = [with_llama_names(cut_for_rank(from_llama(model), rank, 2, queries=WIDTH, kv=WIDTH // 2, gated=True)) for rank in range(2)]
    write_sequential(tmp_path / "theirs", parts, head(7, args(2)))
    values = {
        "norm": "rmsnorm",
        "rms_norm_epsilon": 1e-6,
        "activation": "swiglu",
        "intermediate_size": 3 * FFN,
        "num_kv_heads": 2,
        "use_bias_in_attn_linear": False,
        "use_bias_in_mlp": False,
    }
    check_same(run(values, tmp_path, documents), neox_reference.train(model, documents, SETTINGS))


def test_the_reference_reads_as_the_specification_says() -> None:
    """GPT-NeoX's own numbers for four documents of 3, 2, 4 and 5 tokens, and for its learning rate."""
    texts = [np.arange(size) + 10 * number for number, size in enumerate((3, 2, 4, 5))]
    order, shuffle = [3, 0, 3, 2, 1, 2, 1, 0, 0, 1, 2, 3], [3, 9, 2, 1, 7, 5, 4, 0, 8, 6]
    text = np.concatenate([texts[number] for number in order])
    settings = Settings(seq_length=4, train_iters=5, micro_batch=1, accumulation=2)
    read = neox_reference.samples(texts, settings)
    assert neox_reference.training_documents(1000) == 969
    assert neox_reference.training_documents(4) == 4
    assert [list(sample) for sample in read] == [list(text[4 * number : 4 * number + 5]) for number in shuffle]
    rates = Settings(lr=1e-3, min_lr=1e-4, warmup=0.1, train_iters=100)
    expected = {0: 1.0e-4, 1: 1.0e-4, 10: 1.0e-3, 11: 9.997259e-4, 55: 5.5e-4, 100: 1.0e-4}
    assert {n: neox_reference.learning_rate(rates, n) for n in expected} == pytest.approx(expected, rel=1e-6)
