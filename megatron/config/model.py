"""The transformer: sizes, positions, norms, activation, initialisation, precision."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import Field

from megatron.config.attention import attention_problems, expand_attention
from megatron.config.rope import RopeScaling, rope_problems
from megatron.config.section import Fraction, NaturalInt, PositiveFloat, PositiveInt, Problem, Section

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
QK_NORM_KEYS = ("use_qk_layernorm", "qk_norm_per_head", "qk_norm_all_heads")
WIDTH_KEYS = ("ffn_hidden_size", "intermediate_size", "expansion_factor")


class ModelConfig(Section):
    not_built = {"norm": {f"te_{norm}": f"Transformer Engine is not used; write {norm}" for norm in ("layernorm", "rmsnorm")}}

    num_layers: PositiveInt
    """Number of transformer layers."""
    hidden_size: PositiveInt
    """Number of features that the model keeps for each token (the hidden size)."""
    num_attention_heads: PositiveInt
    """Number of attention heads (query heads). It must divide `hidden_size`, unless `head_dim` is given."""
    num_kv_heads: PositiveInt | None = None
    """Number of key/value heads (grouped-query attention). It must divide `num_attention_heads`. None: each query head has its own key/value head."""
    head_dim: PositiveInt | None = None
    """Dimension of one attention head, as in Hugging Face's config.json (`kv_channels` in Megatron-LM). None: hidden_size / num_attention_heads.
    NeoX has no such key."""
    seq_length: PositiveInt
    """Number of tokens in one training sequence. It must be at most `max_position_embeddings`."""
    max_position_embeddings: PositiveInt
    """Number of tokens in the longest sequence that the model can read. A learned position table has this many rows."""
    ffn_hidden_size: PositiveInt | None = None
    """Hidden width of MLPs and experts. It is used as given, with a gated activation too (as in Megatron-LM). None: `intermediate_size` decides."""
    intermediate_size: PositiveInt | None = None
    """Size of the MLP, by NeoX's rule. Dense MLP: it is the hidden width; with a gated activation it is 3 times the hidden width. Experts: it is
    the hidden width. None: 4 * hidden_size."""
    expansion_factor: Annotated[float, Field(gt=0, le=1e6)] | None = None
    """`intermediate_size` as a multiple of hidden_size. None: 4, unless `intermediate_size` or `ffn_hidden_size` is given."""
    mlp_multiple_of: PositiveInt = 1
    """The width of a dense MLP is rounded up to a multiple of this. `ffn_hidden_size` is not rounded: it must be a multiple of this."""
    norm: Norm = "layernorm"
    """Kind of norm before attention, before the MLP and before the output head. scalenorm divides by the length of the vector and has a single
    weight. non_parametric_layernorm has no weights."""
    layernorm_epsilon: PositiveFloat = 1e-5
    """Added to the variance in layernorm and non_parametric_layernorm."""
    rms_norm_epsilon: PositiveFloat = 1e-8
    """Added to the mean square in rmsnorm."""
    scalenorm_epsilon: PositiveFloat = 1e-8
    """Smallest length that scalenorm divides by."""
    layernorm_fusion: bool = False
    """Compute layernorm with the fused kernels of NVIDIA's package apex, if it is installed and the device is CUDA. Otherwise PyTorch computes it,
    which is fused too. The log and `--check` say which."""
    rmsnorm_fusion: bool = False
    """Compute rmsnorm with the fused kernels of NVIDIA's package apex, if it is installed and the device is CUDA. Otherwise
    `kernel_backends` decides."""
    use_bias_in_norms: bool = True
    """Whether layernorm has biases. The other norms have none. NeoX does not read this key: its layernorm models always have biases."""
    use_qk_layernorm: bool = False
    """Apply one norm (of the kind that `norm` names) to queries and to keys. It has one weight for each query head and dimension. layernorm takes
    its mean over all heads; the other norms take it over each head. As in NeoX, grouped key/value heads are repeated before the norm. The model
    then needs as much memory as one without groups."""
    qk_norm_per_head: bool = False
    """Apply a norm (of the kind that `norm` names) to each query head, and another norm to each key head, as in Qwen 3. NeoX has no such key."""
    qk_norm_all_heads: bool = False
    """Apply a norm (of the kind that `norm` names) to all query heads together, and another norm to all key heads together, as in OLMoE and OLMo
    2. NeoX has no such key."""
    pos_emb: Literal["learned", "rotary", "sinusoidal", "rpe", "alibi", "none"] = "learned"
    """How the model knows positions. learned: a trained table is added to the embeddings. sinusoidal: fixed waves are added to the embeddings.
    rotary: queries and keys are rotated. rpe: T5's trained table of distances is added to the attention scores. alibi: distances times a slope are
    added to the attention scores. none: the model has no positions."""
    rotary_pct: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Share of each head's dimensions that rotary positions rotate. The resulting number of dimensions must be even."""
    rotary_emb_base: PositiveInt = 10000
    """Base of the rotary frequencies."""
    rope_scaling: RopeScaling | None = None
    """Scaled rotary frequencies, as in Hugging Face's config.json: {rope_type: llama3, factor, low_freq_factor, high_freq_factor,
    original_max_position_embeddings}, or {rope_type: linear, factor}. None: not scaled. NeoX has no such key."""
    rotary_save_freqs_buffer: bool = False
    """Write the rotary frequencies into checkpoints, because some NeoX versions expect them there. This program never reads them."""
    rpe_num_buckets: Annotated[int, Field(ge=2)] = 32
    """Number of distance buckets of `pos_emb: rpe`. The first half hold one distance each. The others hold ranges of distances, and the ranges
    grow."""
    rpe_max_distance: PositiveInt = 128
    """With `pos_emb: rpe`, all distances from this one on share the last bucket. It must be more than half of `rpe_num_buckets`."""
    opt_pos_emb_offset: NaturalInt = 0
    """Row of the learned position table that position 0 uses (2 in OPT). The rows before it are not used."""
    sliding_window_width: PositiveInt | None = None
    """Number of earlier tokens that a token attends to, besides itself. Hugging Face's sliding_window is this number plus 1. None: all earlier
    tokens."""
    attention_config: list[Any] | None = None
    """Kind of attention in each layer: a list of names, or a list of [[names], repetitions or "all"]. global: PyTorch's SDPA. flash: the package
    flash_attn where it is installed and can run, otherwise SDPA. Both compute the same. None: global in every layer."""
    apply_query_key_layer_scaling: bool = False
    """NeoX divides attention scores by the layer's number and multiplies them by it inside the softmax, against overflow in fp16. Here fp16 needs
    no such step. One effect remains: in layers with global attention, the biases of alibi and rpe are multiplied by the layer's number."""
    no_weight_tying: bool = False
    """True: the output head has its own weights. False: it uses the word embeddings."""
    make_vocab_size_divisible_by: PositiveInt = 128
    """The size of the vocabulary is rounded up to a multiple of this. NeoX rounds up to a multiple of this times model_parallel_size."""
    activation: Activation = "gelu"
    """Activation function of MLPs and experts. geglu, reglu, swiglu, glu and bilinear are gated: they have two input projections. The gate of glu
    is a sigmoid. The gate of bilinear has no activation function. swish is the same as silu."""
    bias_gelu_fusion: bool = False
    """True: `gelu` is the tanh approximation, as in NeoX's fused kernel. False: `gelu` is exact. The key has no effect on other activations."""
    gpt_j_residual: bool = False
    """True: attention and MLP read the same hidden state, and both results are added to it (parallel residual). False: attention comes first, then
    the MLP."""
    gpt_j_tied: bool = False
    """With `gpt_j_residual: true`: attention and MLP share one norm. As in NeoX, the weights of the second norm exist but are not used."""
    reordered_norm: bool = False
    """True: x + norm(attention(x)), then x + norm(mlp(x)), as in OLMo 2. The norms are applied to the outputs of attention and MLP, not to their
    inputs. NeoX has no such key."""
    use_bias_in_attn_linear: bool = True
    """Whether all projections of attention have biases: query/key/value and output."""
    add_qkv_bias: bool = False
    """Whether the query/key/value projections alone have biases, as in Qwen 2 and GLM-4.5. It needs `use_bias_in_attn_linear: false`.
    Megatron-Core has this key too; NeoX has no such key."""
    use_bias_in_mlp: bool = True
    """Whether the two projections of dense MLPs have biases. For experts see `moe_expert_bias`."""
    attention_dropout: Fraction = 0.0
    """Dropout probability on attention weights."""
    hidden_dropout: Fraction = 0.0
    """Dropout probability on the embeddings and on the outputs of attention and MLP. As in NeoX, the outputs of experts and of MLPs without biases
    have no dropout."""
    init_method: InitMethod = "normal"
    """Initialisation of the input projections, the embeddings and the output head."""
    output_layer_init_method: InitMethod = "scaled_normal"
    """Initialisation of the output projections of attention, MLPs and experts."""
    init_method_std: PositiveFloat = 0.02
    """Standard deviation of `normal`. The scaled normals multiply it by a scale."""
    precision: Literal["fp32", "fp16", "bfloat16"] | None = None
    """Number format of weights and activations. None: the format of the enabled dictionary, `fp16` or `bf16`; fp32 if there is none."""

    @property
    def head_width(self) -> int:
        """Dimensions of one attention head, `head_dim` resolved."""
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @property
    def attention_width(self) -> int:
        """Dimensions of all query heads together: what the output projection of attention reads."""
        return self.num_attention_heads * self.head_width

    @property
    def has_qkv_bias(self) -> bool:
        """Whether queries, keys and values have biases; `use_bias_in_attn_linear` says whether the output projection has one."""
        return self.use_bias_in_attn_linear or self.add_qkv_bias

    @property
    def kv_heads(self) -> int:
        """Key/value heads, `num_kv_heads` resolved."""
        return self.num_kv_heads or self.num_attention_heads

    @property
    def attended_kv_heads(self) -> int:
        """Key/value heads that queries meet: with `use_qk_layernorm` one each, since its weights differ from query head to query head."""
        return self.num_attention_heads if self.use_qk_layernorm else self.kv_heads

    @property
    def qk_norm_widths(self) -> tuple[int, int] | None:
        """What the norms of queries and of keys are over, where each has one of its own. None: they have not."""
        if self.qk_norm_all_heads:
            return self.attention_width, self.kv_heads * self.head_width
        return (self.head_width, self.head_width) if self.qk_norm_per_head else None

    @property
    def rotary_dim(self) -> int:
        """Dimensions of one head that rotary positions turn."""
        return int(self.head_width * self.rotary_pct)

    @property
    def max_positions(self) -> int:
        """Tokens of the longest text that there are positions for."""
        return self.max_position_embeddings - self.opt_pos_emb_offset

    @property
    def attention_types(self) -> list[str]:
        """`attention_config` as one name a layer."""
        return expand_attention(self.attention_config, self.num_layers)

    def position_bias_coefficient(self, layer: int) -> float:
        """What alibi and rpe biases are multiplied by in a layer (from 0)."""
        scaled = self.apply_query_key_layer_scaling and self.attention_types[layer] == "global"
        return float(max(1, layer)) if scaled else 1.0

    @property
    def residual(self) -> str:
        """How attention, MLP and their norms meet the residual stream: `sequential`, `parallel`, `tied` (parallel, with one norm) or `reordered`."""
        if self.reordered_norm:
            return "reordered"
        return ("sequential", "parallel", "tied")[self.gpt_j_residual + self.gpt_j_tied]

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
        """Hidden width F of a dense MLP: `ffn_hidden_size`, or NeoX's sizing, with the gated case's two projections agreeing (NeoX's differ by
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
        if self.head_dim is None and self.hidden_size % heads:
            message = f"must divide hidden_size ({self.hidden_size}); if it does not, give head_dim, the dimension of one head"
            yield Problem(("num_attention_heads", "hidden_size", "head_dim"), message)
        elif self.pos_emb == "rotary" and (self.rotary_dim < 2 or self.rotary_dim % 2):
            message = f"must rotate an even number of dimensions, at least 2, of each head's {self.head_width}; this value rotates {self.rotary_dim}"
            sizes = ("hidden_size", "num_attention_heads") if self.head_dim is None else ("head_dim",)
            yield Problem(("rotary_pct", *sizes), message)
        if heads % self.kv_heads:
            yield Problem(("num_kv_heads", "num_attention_heads"), f"must divide num_attention_heads ({heads})")
        if self.seq_length > self.max_position_embeddings:
            message = f"must be at most max_position_embeddings ({self.max_position_embeddings})"
            yield Problem(("seq_length", "max_position_embeddings"), message)
        if self.add_qkv_bias and self.use_bias_in_attn_linear:
            message = (
                "puts biases on the query/key/value projections only; write use_bias_in_attn_linear: false too, "
                "or remove add_qkv_bias to have biases on all projections"
            )
            yield Problem(("add_qkv_bias", "use_bias_in_attn_linear"), message)
        yield from self._width_problems()
        yield from self._position_problems()
        yield from attention_problems(self.attention_config, self.num_layers)
        norms = [key for key in QK_NORM_KEYS if getattr(self, key)]
        if len(norms) > 1:
            yield Problem((norms[1], norms[0]), f"cannot be combined with {norms[0]}; keep one of them")
        if self.gpt_j_tied and not self.gpt_j_residual:
            yield Problem(("gpt_j_tied", "gpt_j_residual"), "needs gpt_j_residual: true, because only then attention and MLP read the same input")
        if self.reordered_norm and self.gpt_j_residual:
            yield Problem(("reordered_norm", "gpt_j_residual"), "cannot be combined with gpt_j_residual; keep one of them")

    def _position_problems(self) -> Iterator[Problem]:
        if self.opt_pos_emb_offset and self.pos_emb != "learned":
            yield Problem(("opt_pos_emb_offset", "pos_emb"), f"is for pos_emb: learned; pos_emb: {self.pos_emb} has no position table")
        elif self.seq_length <= self.max_position_embeddings < self.seq_length + self.opt_pos_emb_offset:
            message = f"leaves {max(0, self.max_positions)} of {self.max_position_embeddings} rows, fewer than seq_length ({self.seq_length})"
            yield Problem(("opt_pos_emb_offset", "max_position_embeddings", "seq_length"), message)
        if self.rope_scaling is not None:
            yield from rope_problems(self.rope_scaling, self.pos_emb)
        if self.pos_emb == "sinusoidal" and self.hidden_size % 2:
            yield Problem(("hidden_size", "pos_emb"), "must be even with pos_emb: sinusoidal, because each position has pairs of sine and cosine")
        if self.pos_emb == "rpe" and self.rpe_max_distance <= self.rpe_num_buckets // 2:
            yield Problem(("rpe_max_distance", "rpe_num_buckets"), f"must be more than half of rpe_num_buckets ({self.rpe_num_buckets})")

    def _width_problems(self) -> Iterator[Problem]:
        given = tuple(key for key in WIDTH_KEYS if getattr(self, key) is not None)
        if len(given) > 1:
            yield Problem(given, f"sets the width of the MLP, and {' and '.join(given[1:])} sets it too; keep one of them")
        elif self.ffn_hidden_size is not None and self.ffn_hidden_size % self.mlp_multiple_of:
            yield Problem(("ffn_hidden_size", "mlp_multiple_of"), f"must be a multiple of mlp_multiple_of ({self.mlp_multiple_of})")
        elif self.mlp_width < 1 or self.mlp_size == 0:
            yield Problem(given or ("hidden_size",), "makes an MLP of width 0; give a larger number")
