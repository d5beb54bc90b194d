"""The transformer: sizes, positions, norms, activation, initialisation, precision."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from megatron.config.section import Fraction, PositiveFloat, PositiveInt, Problem, Section

Activation = Literal["gelu", "geglu", "relu", "softsign", "swish", "mish", "silu", "reglu", "swiglu", "bilinear", "glu"]
Norm = Literal["layernorm", "rmsnorm", "scalenorm", "non_parametric_layernorm"]
InitMethod = Literal[
    "normal",
    "scaled_normal",
    "orthogonal",
    "scaled_orthogonal",
    "xavier_uniform",
    "xavier_normal",
    "wang_init",
    "small_init",
    "single_residual_scaled_normal",
]
GATED_ACTIVATIONS = frozenset({"geglu", "reglu", "swiglu", "bilinear", "glu"})
WIDTH_KEYS = ("ffn_hidden_size", "intermediate_size", "expansion_factor")


class ModelConfig(Section):
    num_layers: PositiveInt
    """Number of transformer layers."""
    hidden_size: PositiveInt
    """Width of the residual stream."""
    num_attention_heads: PositiveInt
    """Query heads; must divide `hidden_size`."""
    num_kv_heads: PositiveInt | None = None
    """Key/value heads (grouped-query attention); must divide `num_attention_heads`. None: one per query head."""
    seq_length: PositiveInt
    """Tokens in one training sequence; at most `max_position_embeddings`."""
    max_position_embeddings: PositiveInt
    """Longest sequence the positions can express; the number of rows of a learned position table."""
    ffn_hidden_size: PositiveInt | None = None
    """Hidden width of MLPs and experts as it is, gated or not (Megatron-LM's meaning). None: `intermediate_size` and its rule decide."""
    intermediate_size: PositiveInt | None = None
    """MLP size. Dense MLP: the width, or for gated activations 3 times the width (NeoX's rule). Experts: the width as is. None: 4 * hidden_size."""
    expansion_factor: PositiveFloat | None = None
    """`intermediate_size` as a multiple of hidden_size. None: 4, or whatever `intermediate_size` or `ffn_hidden_size` say."""
    mlp_multiple_of: PositiveInt = 1
    """The width of a dense MLP is rounded up to a multiple of this; `ffn_hidden_size` has to be one."""
    norm: Norm = "layernorm"
    """Normalisation before attention, before the MLP and before the output head. scalenorm divides by the length and has one weight in all;
    non_parametric_layernorm has none."""
    layernorm_epsilon: PositiveFloat = 1e-5
    """Added to the variance in layernorm and non_parametric_layernorm."""
    rms_norm_epsilon: PositiveFloat = 1e-8
    """Added to the mean square in rmsnorm."""
    scalenorm_epsilon: PositiveFloat = 1e-8
    """The least length that scalenorm divides by."""
    use_bias_in_norms: bool = True
    """Biases in layernorm (the other norms have none). NeoX does not read this key: its layernorm models always have biases."""
    pos_emb: Literal["learned", "rotary", "none"] = "learned"
    """Positions: a learned table, rotary attention, or none."""
    rotary_pct: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Share of each head's dimensions that rotary positions turn; the number of dimensions must come out even."""
    rotary_emb_base: PositiveInt = 10000
    """Base of the rotary frequencies."""
    no_weight_tying: bool = False
    """True: the output head has its own weights. False: it uses the word embeddings."""
    make_vocab_size_divisible_by: PositiveInt = 128
    """The vocabulary is padded up to a multiple of this."""
    activation: Activation = "gelu"
    """Activation of MLPs and experts; geglu, reglu, swiglu, glu (sigmoid) and bilinear (none) are gated (two input projections). swish is silu."""
    bias_gelu_fusion: bool = False
    """True: `gelu` is the tanh approximation, as in NeoX's fused kernel; no effect on other activations. False: the exact one."""
    gpt_j_residual: bool = False
    """True: attention and MLP read the same residual stream and are added together (parallel residual)."""
    gpt_j_tied: bool = False
    """With `gpt_j_residual`: one norm serves attention and MLP. The second norm's weights are there, as in NeoX, and unused."""
    use_bias_in_attn_linear: bool = True
    """Biases on the query/key/value and output projections of attention."""
    use_bias_in_mlp: bool = True
    """Biases on the two projections of dense MLPs (experts never have biases)."""
    attention_dropout: Fraction = 0.0
    """Dropout probability on attention weights."""
    hidden_dropout: Fraction = 0.0
    """Dropout probability on embeddings and on what attention and MLP add to the residual stream."""
    init_method: InitMethod = "normal"
    """Initialisation of input projections, embeddings and the output head."""
    output_layer_init_method: InitMethod = "scaled_normal"
    """Initialisation of the projections that write to the residual stream."""
    init_method_std: PositiveFloat = 0.02
    """Standard deviation of `normal` and, before scaling, of the scaled normals."""
    precision: Literal["fp32", "fp16", "bfloat16"] | None = None
    """Number format of weights and activations. None: as the `fp16`/`bf16` dictionaries say, fp32 without them."""

    @property
    def head_dim(self) -> int:
        """Dimensions of one attention head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def kv_heads(self) -> int:
        """Key/value heads, `num_kv_heads` resolved."""
        return self.num_kv_heads or self.num_attention_heads

    @property
    def rotary_dim(self) -> int:
        """Dimensions of one head that rotary positions turn."""
        return int(self.head_dim * self.rotary_pct)

    @property
    def is_gated(self) -> bool:
        """Whether the activation takes a second input projection."""
        return self.activation in GATED_ACTIVATIONS

    @property
    def hidden_function(self) -> str:
        """Name of the function that is computed: `activation`, or `gelu_tanh`."""
        return "gelu_tanh" if self.activation == "gelu" and self.bias_gelu_fusion else self.activation

    @property
    def mlp_size(self) -> int | None:
        """`intermediate_size`, also where it is given as `expansion_factor`; None where it is not given at all."""
        if self.expansion_factor is not None:
            return int(self.expansion_factor * self.hidden_size)
        return self.intermediate_size

    @property
    def mlp_width(self) -> int:
        """Hidden width F of a dense MLP: `ffn_hidden_size`, or NeoX's sizing, with the gated case's two projections agreeing (upstream's differ by
        one for some sizes).
        """
        if self.ffn_hidden_size is not None:
            return self.ffn_hidden_size
        size = self.mlp_size or 4 * self.hidden_size
        step = self.mlp_multiple_of
        if self.is_gated:
            return step * -(-int(2 * size / 3) // (2 * step))
        return step * -(-size // step)

    def check(self) -> Iterator[Problem]:
        heads = self.num_attention_heads
        if self.hidden_size % heads:
            yield Problem(("num_attention_heads", "hidden_size"), f"must divide hidden_size ({self.hidden_size})")
        elif self.pos_emb == "rotary" and (self.rotary_dim < 2 or self.rotary_dim % 2):
            message = (
                f"must turn an even number of dimensions, at least 2, of each head's {self.head_dim}; {self.rotary_pct} of them is {self.rotary_dim}"
            )
            yield Problem(("rotary_pct", "hidden_size", "num_attention_heads"), message)
        if heads % self.kv_heads:
            yield Problem(("num_kv_heads", "num_attention_heads"), f"must divide num_attention_heads ({heads})")
        if self.seq_length > self.max_position_embeddings:
            message = f"must be at most max_position_embeddings ({self.max_position_embeddings})"
            yield Problem(("seq_length", "max_position_embeddings"), message)
        yield from self._width_problems()
        if self.gpt_j_tied and not self.gpt_j_residual:
            yield Problem(("gpt_j_tied", "gpt_j_residual"), "needs gpt_j_residual: true; otherwise the two norms read different things")

    def _width_problems(self) -> Iterator[Problem]:
        given = tuple(key for key in WIDTH_KEYS if getattr(self, key) is not None)
        if len(given) > 1:
            yield Problem(given, f"says how wide the MLP is, and so does {' and '.join(given[1:])}; keep one of them")
        elif self.ffn_hidden_size is not None and self.ffn_hidden_size % self.mlp_multiple_of:
            yield Problem(("ffn_hidden_size", "mlp_multiple_of"), f"must be a multiple of mlp_multiple_of ({self.mlp_multiple_of})")
        elif self.mlp_width < 1 or self.mlp_size == 0:
            yield Problem(given or ("hidden_size",), "leaves an MLP of width 0")
