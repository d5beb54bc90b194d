"""The parts that tables are put together from: where each of our weights lies, and Hugging Face's usual names for it.

Shapes: D model width; F hidden width; E experts; H query heads; K key/value heads; d head dimension.
"""

from __future__ import annotations

from collections.abc import Iterator

from megatron.config.model import ModelConfig
from megatron.config.moe import MoEConfig
from megatron.convert.architecture import Source
from megatron.convert.mapping import Constant, Entry, Form, HeadByHead, PerExpert, Rows, Same, Zero

FIRST_LAYER = 2
"""Number of the first transformer layer in our names."""


def ours(layer: int) -> str:
    """Where the weights of a transformer layer (from 0) begin."""
    return f"sequential.{FIRST_LAYER + layer}"


def ends(source: Source, names: tuple[str, str, str] = ("model.embed_tokens", "model.norm", "lm_head")) -> Iterator[Entry]:
    """Embedding, last norm, head; `names` are theirs."""
    model, (embedding, last_norm, head) = source.config.model, names
    yield Entry("sequential.0.word_embeddings.weight", (f"{embedding}.weight",))
    yield from norm(model, f"sequential.{model.num_layers + 3}.norm", last_norm)
    if model.no_weight_tying:
        yield Entry(f"sequential.{model.num_layers + 4}.final_linear.weight", (f"{head}.weight",))


def norm(model: ModelConfig, name: str, theirs: str) -> Iterator[Entry]:
    """A norm: rmsnorm's `scale` is `weight` there; non-parametric ones have nothing."""
    if model.norm == "rmsnorm":
        yield Entry(f"{name}.scale", (f"{theirs}.weight",))
    elif model.norm == "layernorm":
        yield Entry(f"{name}.weight", (f"{theirs}.weight",))
        if model.use_bias_in_norms:
            yield Entry(f"{name}.bias", (f"{theirs}.bias",))
        else:
            yield Entry(None, (f"{theirs}.bias",), Constant(model.hidden_size, 0.0))


NORMS = ("input_layernorm", "post_attention_layernorm")


def layer_norms(model: ModelConfig, layer: int, theirs: str, names: tuple[str, str] = NORMS) -> Iterator[Entry]:
    """The two norms of a layer; `names` are theirs."""
    for name, their_name in zip(NORMS, names, strict=True):
        yield from norm(model, f"{ours(layer)}.{name}", f"{theirs}.{their_name}")


def query_key_value(model: ModelConfig) -> Form:
    """From the fused rows to queries, keys and values."""
    heads, kv_heads, d = model.num_attention_heads, model.kv_heads, model.head_width
    return HeadByHead(heads) if heads == kv_heads else Rows([heads * d, kv_heads * d, kv_heads * d])


def attention(model: ModelConfig, layer: int, theirs: str, *, bias_of_output: bool = True) -> Iterator[Entry]:
    """q_proj, k_proj, v_proj and o_proj; a bias of ours on the output has to be zero where they have none."""
    name = f"{ours(layer)}.attention"
    for part in ("weight", "bias") if model.has_qkv_bias else ("weight",):
        yield Entry(f"{name}.query_key_value.{part}", tuple(f"{theirs}.{which}_proj.{part}" for which in "qkv"), query_key_value(model))
    yield Entry(f"{name}.dense.weight", (f"{theirs}.o_proj.weight",))
    if model.use_bias_in_attn_linear:
        zero = Entry(f"{name}.dense.bias", (), Zero(model.hidden_size))
        yield Entry(f"{name}.dense.bias", (f"{theirs}.o_proj.bias",)) if bias_of_output else zero


def head_norms(layer: int, theirs: str) -> Iterator[Entry]:
    """RMS norms of queries and of keys, of each head or of all together."""
    for which in ("q_norm", "k_norm"):
        yield Entry(f"{ours(layer)}.attention.{which}.scale", (f"{theirs}.{which}.weight",))


def gated_mlp(name: str, theirs: str, width: int, *, bias: bool = False) -> Iterator[Entry]:
    """linear1 = [up ; gate] and linear2, as gate_proj, up_proj and down_proj of hidden width `width`."""
    for part in ("weight", "bias") if bias else ("weight",):
        yield Entry(f"{name}.linear1.{part}", (f"{theirs}.gate_proj.{part}", f"{theirs}.up_proj.{part}"), Rows([width, width], [1, 0]))
        yield Entry(f"{name}.linear2.{part}", (f"{theirs}.down_proj.{part}",), Same())


def gated_experts(moe: MoEConfig, layer: int, theirs: str, names: tuple[str, str, str]) -> Iterator[Entry]:
    """w3 (gate), w1 (up) and w2 (down) of every expert as matrices of its own; `names` are theirs for gate, up and down."""
    count = moe.num_experts
    for which, name in zip(("w3", "w1", "w2"), names, strict=True):
        form = PerExpert(count, transposed=which == "w2")
        yield Entry(f"{ours(layer)}.mlp.experts.mlp.{which}", tuple(f"{theirs}.experts.{expert}.{name}.weight" for expert in range(count)), form)
