"""Configuration of `StructMoEForCausalLM`. Written into exports by StructMoE-NeoX; needs transformers and nothing else."""

from __future__ import annotations

from dataclasses import field
from typing import Any

from transformers.configuration_utils import PreTrainedConfig

CHOICES: dict[str, tuple[str, ...]] = {
    "norm_type": ("layernorm", "rmsnorm", "scalenorm", "non_parametric_layernorm"),
    "qk_norm": ("none", "all_heads", "per_head", "jointly"),
    "position_type": ("rotary", "learned", "sinusoidal", "alibi", "rpe", "none"),
    "residual_type": ("sequential", "parallel", "tied", "reordered"),
    "hidden_act": ("gelu", "gelu_tanh", "relu", "softsign", "swish", "mish", "silu", "geglu", "reglu", "swiglu", "glu", "bilinear"),
    "router_type": (
        "topk",
        "sinkhorn",
        "sigmoid",
        "top_p",
        "expert_choice",
        "quantile_balancing",
        "expert_threshold",
        "document_pool",
        "recurrent",
        "smoe_dropout",
    ),
    "expert_type": ("grouped", "structmoe", "decomposed"),
    "lore_interaction": ("entangled", "standalone", "gated"),
    "lore_projection": ("up", "gate", "both"),
}
"""What the settings that are names may be."""
GATED_ACTIVATIONS = ("geglu", "reglu", "swiglu", "glu", "bilinear")


class StructMoEConfig(PreTrainedConfig):
    """A decoder-only language model whose layers are dense or mixtures of experts, in any of StructMoE-NeoX's variants.

    Raises ValueError for a name that is not in `CHOICES`, and for lists that do not have an entry for each layer.
    """

    model_type = "structmoe_neox"
    keys_to_ignore_at_inference = ["past_key_values"]

    vocab_size: int = 50304
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    num_key_value_heads: int | None = None
    """Grouped-query attention. None: as many as query heads."""
    head_dim: int | None = None
    """Dimensions of one attention head. None: hidden_size / num_attention_heads."""
    max_position_embeddings: int = 2048
    intermediate_size: int = 3072
    """Hidden width of dense MLPs, gated or not."""
    hidden_act: str = "gelu"
    """Gated ones have a third matrix: act(gate) * up."""
    attention_bias: bool = True
    """On queries, keys, values and the output of attention."""
    qkv_bias: bool = False
    """On queries, keys and values, whatever `attention_bias` says."""
    mlp_bias: bool = True
    """Of dense MLPs and shared experts; `expert_bias` is for routed ones."""
    attention_dropout: float = 0.0
    hidden_dropout: float = 0.0
    """On embeddings and on what attention and MLPs with biases add to the residual stream; as in GPT-NeoX, not on what others and experts add."""
    residual_type: str = "sequential"
    """parallel: attention and MLP read the same hidden state; tied: through the same norm, the second of which is then unused; reordered: norms on
    what attention and MLP add (OLMo 2)."""
    norm_type: str = "layernorm"
    norm_eps: float = 1e-5
    norm_bias: bool = True
    """Of layernorm; the others have none."""
    qk_norm: str = "none"
    """all_heads: one norm with weights [heads, head dimension] for queries and keys, grouped key/value heads being repeated for it; per_head: one for
    each, over the head dimension; jointly: one for each, over the dimensions of all its heads."""

    position_type: str = "rotary"
    rotary_pct: float = 1.0
    rotary_emb_base: int = 10000
    rotary_scaling: dict[str, Any] = field(default_factory=dict)
    """Scaled frequencies: {rope_type: linear, factor}, or {rope_type: llama3, factor, low_freq_factor, high_freq_factor,
    original_max_position_embeddings}. Empty: not scaled."""
    position_offset: int = 0
    """Row of a learned table that position 0 has."""
    rpe_num_buckets: int = 32
    rpe_max_distance: int = 128
    position_bias_scale: list[float] = field(default_factory=list)
    """What each layer multiplies alibi or rpe biases by. Empty: 1."""
    sliding_window: int | None = None
    """Tokens that a token sees, itself included. None: all before it."""

    num_experts_by_layer: list[int] = field(default_factory=list)
    """Experts of each layer, 0 for a dense one. Empty: all dense."""
    moe_intermediate_size: int = 3072
    """Hidden width of one expert."""
    expert_type: str = "grouped"
    expert_bias: bool = False
    """Biases on the projections of routed experts."""
    router_type: str = "topk"
    num_experts_per_tok: int = 1
    """With expert_choice and expert_threshold the mean; top_p chooses the number by itself."""
    norm_topk_prob: bool = False
    """Divide the weights of the chosen experts by their sum."""
    routed_scaling_factor: float = 1.0
    router_jitter_noise: float = 0.0
    """In training the router's input is multiplied by a random factor from 1 - this to 1 + this."""
    n_group: int | None = None
    """sigmoid: groups of experts. None: no groups."""
    topk_group: int | None = None
    """sigmoid: groups that a token may choose from. None: no groups."""
    router_top_p: float = 0.4
    """top_p: the chosen experts' probabilities sum to at least this."""
    router_rnn_hidden_size: int = 256
    """recurrent: width of what a router remembers of a token from layer to layer."""
    num_experts_in_evaluation: int | None = None
    """smoe_dropout: experts per token where the model does not train, at most num_experts_per_tok. None: the number that the weights hold."""
    latent_size: int | None = None
    """Width that experts read and write, between two projections around all experts of a layer. None: hidden_size."""
    zero_experts: int = 0
    """Experts that the router may choose and that give 0. `num_experts_by_layer` does not count them, nor the next two kinds."""
    copy_experts: int = 0
    """Experts that give their input."""
    constant_experts: int = 0
    """Experts that give a mixture of their input and a vector."""
    shared_expert_intermediate_size: int = 0
    """Width of the expert that every token uses; 0: none."""
    shared_expert_gate: bool = False
    """Multiply it by sigmoid(x w)."""
    residual_mlp: bool = False
    """A dense MLP beside the experts, the two mixed by a learned softmax (DeepSpeed-MoE)."""
    decomposition_rank: int = 1
    """decomposed: rank of the two factors of each matrix."""

    num_lores: int = 8
    """structmoe: low-rank experts (LoREs) in each expert, M."""
    lore_top_k: int = 1
    """LoREs that a token uses, L."""
    lore_rank: int = 64
    lore_norm_topk_prob: bool = False
    """Divide the weights of the chosen LoREs by their sum."""
    lore_routed: bool = True
    """False: one LoRE of rank M * lore_rank in each expert, always on."""
    lore_interaction: str = "entangled"
    """What LoREs do: add to a projection before the activation (StructMoE, equation 2), add to the output, or multiply the hidden layer."""
    lore_projection: str = "up"
    """Gated experts: the projection that entangled LoREs add to."""

    output_router_logits: bool = False
    moe_losses: dict[str, float] = field(default_factory=dict)
    """Auxiliary losses and their coefficients; `LOSSES` and `JOINT` in losses_structmoe.py say which are computed."""
    moe_block_wise_temperature: float = 1.0
    """Of the loss block_wise_selection."""
    zero_computation_balance: float = 0.75
    """Of the loss heterogeneous_load_balance: the weight of zero, copy and constant experts."""
    router_aux_loss_coef: float | None = None
    """What `aux_loss` is multiplied by when it is added to the loss. None: `loss_unit`, so that each loss has its coefficient of `moe_losses`."""

    initializer_range: float = 0.02
    use_cache: bool = True
    tie_word_embeddings: bool = False
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

    def __post_init__(self, **kwargs: object) -> None:
        layers = self.num_hidden_layers
        self.num_key_value_heads = self.kv_heads
        self.head_dim = self.head_width
        self.num_experts_by_layer = self.num_experts_by_layer or [0] * layers
        self.position_bias_scale = self.position_bias_scale or [1.0] * layers
        if self.router_aux_loss_coef is None:
            self.router_aux_loss_coef = self.loss_unit if self.moe_losses else 0.0
        for name, allowed in CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} = '{getattr(self, name)}': must be one of {', '.join(allowed)}")
        for name in ("num_experts_by_layer", "position_bias_scale"):
            if len(getattr(self, name)) != layers:
                raise ValueError(f"{name} has {len(getattr(self, name))} entries: must have one for each of the {layers} layers")
        super().__post_init__(**kwargs)

    @property
    def kv_heads(self) -> int:
        """Key/value heads."""
        return self.num_key_value_heads or self.num_attention_heads

    @property
    def head_width(self) -> int:
        """Dimensions of one attention head."""
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @property
    def num_experts(self) -> int:
        """Experts of the first layer that has any; 0 in a dense model. (The name that trainers ask for.)"""
        return next((count for count in self.num_experts_by_layer if count), 0)

    @property
    def loss_unit(self) -> float:
        """The coefficient that the others are measured by in `aux_loss`: that of a balance loss, else the first of `moe_losses`, else 1.

        So `aux_loss` and `router_aux_loss_coef` mean what they do in transformers' own models, whose only such loss is `joint_load_balance`.
        """
        balance = self.moe_losses.get("load_balance") or self.moe_losses.get("joint_load_balance")
        return balance or next(filter(None, self.moe_losses.values()), 1.0)

    @property
    def is_gated(self) -> bool:
        """Whether MLPs and experts have a gate."""
        return self.hidden_act in GATED_ACTIVATIONS
