"""What an analysis of routing found: typed values that pages, pictures and `routing.json` share. Nothing here computes.

Shares are parts of 1. Where layers have different numbers of experts, arrays have room for the largest and NaN (counts: 0) in the places that do not
exist; `experts_L` says how many there are. An entry is NaN, too, where there was nothing to measure (no pair of tokens, an expert without rows).

Shapes: G groups of tokens; L layers with experts; E experts of the layer with the most; K experts of a token; M LoREs of an expert; P percentiles;
        W window lengths; C numbers of slots; R numbers of processes; N tokens of a sample; H experts shown; U LoREs of a token in one expert;
        S checkpoints.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Counts = npt.NDArray[np.int64]
FORMAT = 1
PERCENTILES = (0, 5, 25, 50, 75, 95, 100)
ALL = "all"
"""The group of all tokens together, the last one. It is there if there is more than one domain."""


@dataclass(frozen=True)
class Load:
    """Which experts the tokens went to: Mixtral's Figures 7 and 9 (arXiv 2401.04088), CoSMoEs' Figure 6 and delta uniform, dead experts."""

    choice_GLKE: Counts
    """Tokens of the group for which the expert was the first, second, ... choice."""
    first_GLE: Floats
    """Share of the tokens' first choices; sums to 1 over E. Even: `even_L`."""
    second_GLE: Floats
    """The same for second choices; NaN with one expert for each token."""
    either_GLE: Floats
    """Share of all choices (with two experts for each token, Mixtral's "either choice"); sums to 1 over E. Even: `even_L`."""
    even_L: Floats
    """1 / experts of the layer: the dashed line."""
    delta_uniform_GL: Floats
    """Mean over the experts of |share of the choices - 1/E| (CoSMoEs, section 3.3 and Figure 6; the paper prints it in percent). 0 is even."""
    entropy_GL: Floats
    """Entropy of the shares of the choices over its largest value, log E: 1 is even, 0 is one expert for all."""
    percentiles_GLP: Floats
    """PERCENTILES of the experts' loads over the mean load of the layer: 1 is even."""
    percentiles_GP: Floats
    """The same over the experts of all layers together."""
    dead_GL: Counts
    """Experts that no token of the group used."""
    weight_LK: Floats
    """Mean weight of the first, second, ... choice; NaN where the trace has no weights."""


@dataclass(frozen=True)
class Repeats:
    """How often the next token uses the same experts: Mixtral's Table 5 and Figure 10, and CoSMoEs' ExRep."""

    pairs_G: Counts
    """Pairs of consecutive tokens of one text."""
    first_GL: Floats
    """Share of pairs with the same first choice."""
    first_or_second_GL: Floats
    """Share of pairs where an expert is first or second choice of both tokens."""
    any_GL: Floats
    """Share of pairs that have any expert in common: with two experts for each token the same as `first_or_second_GL`."""
    random_first_L: Floats
    """Of random choices: 1/E. For 8 experts 12.5 %."""
    random_first_or_second_L: Floats
    """1 - C(E-2, 2) / C(E, 2). For 8 experts 46.4 %."""
    random_any_L: Floats
    """1 - C(E-k, k) / C(E, k), with k experts for each token."""
    exrep_GL: Floats
    """ExRep: the share of a token's experts that the token before did not use (CoSMoEs, equations 4 and 5)."""
    random_exrep_L: Floats
    """1 - k/E."""


@dataclass(frozen=True)
class Locality:
    """How well a window of consecutive tokens is served by few experts: SRP and SCH of arXiv 2505.16056 ("Not All Models Suit Expert Offloading")."""

    windows: list[int]
    """Their lengths in tokens. Windows that no text is long enough for are left out."""
    slots: list[int]
    sch_GLWC: Floats
    """SCH: the share of a window's choices that falls on the experts most used in it, as many as there are slots."""
    srp_GLW: Floats
    """SRP: the best F1 of one set of experts for all tokens of a window."""
    srp_size_GLW: Floats
    """The experts of these sets over those of a token."""


@dataclass(frozen=True)
class CoActivation:
    """Which experts work together (OLMoE, arXiv 2409.02060, section 5.2). It needs two experts for each token."""

    shown_LH: Counts
    """Experts of the layer that are in the matrix: all, or those that are most in pairs; -1 in empty places."""
    share_LHH: Floats
    """[i, j]: the share of the tokens of expert shown[i] that expert shown[j] got as well; NaN on the diagonal."""
    random_L: Floats
    """(k - 1) / (E - 1)."""
    pairs: list[Pair]
    """The pairs that are surely together more often than by chance, at most 8 a layer, the surest first."""


@dataclass(frozen=True)
class Pair:
    """Two experts of a layer."""

    layer: int
    first: int
    second: int
    tokens: int
    """That used both."""
    lift: float
    """Over the number that chance would give: as many pairs in all, in proportion to the loads of both experts. 1 is chance."""


@dataclass(frozen=True)
class Specialisation:
    """Which texts and tokens an expert gets (OLMoE, sections 5.3 and 5.4)."""

    domain_GLE: Floats
    """Domain specialisation: the share of the group's tokens that use the expert; sums to k over E. Even: k/E."""
    domain_distance_GL: Floats
    """Half of the sum over the experts of |share of the group's choices - share of all choices|: 0 is the same as all text, 1 is disjoint."""
    vocabulary_L: Floats
    """Vocabulary specialisation: the share of a token's occurrences that use the expert that most of its other occurrences use, averaged over the
    occurrences of tokens that are counted. (The expert is chosen on one half of the occurrences and measured on the other, so that chance does not
    add to it.) NaN without tokens."""
    vocabulary_even_L: Floats
    """The same if the token made no difference: the share of tokens that use the busiest expert."""
    least_count: int
    """A token counts if it occurs at least so often."""
    vocabulary_size: int
    """Different tokens that were counted."""
    tokens: list[ExpertTokens]
    """Of each expert the tokens that it gets most above chance. Empty: the trace has no tokens."""
    predicted: list[ExpertTokens] = field(default_factory=list)
    """The same for the token that comes next, whatever the token itself is."""


@dataclass(frozen=True)
class TokenShare:
    """How often a token goes to an expert."""

    token: int
    piece: str
    """Its text."""
    count: int
    """Occurrences that the expert got."""
    total: int
    """Occurrences."""
    share: float
    lift: float
    """Share over the share of all tokens that use the expert: 1 is chance."""
    lower: float
    """The same with the lower end of Wilson's interval for the share, which holds with 95 % for all counted tokens of an expert together. The order
    goes by it, so that rare tokens do not win by chance."""


@dataclass(frozen=True)
class ExpertTokens:
    """One expert's tokens, most above chance first; only those with `lower` above 1."""

    layer: int
    expert: int
    tokens: list[TokenShare]


@dataclass(frozen=True)
class Sample:
    """The beginning of a domain's text, token by token: Mixtral's Figure 8, CoSMoEs' Figure 5."""

    domain: str
    pieces: list[str]
    """N. The texts of the tokens; the number of the token where its text is not known."""
    expert_NLK: Counts
    """The first choice first; -1 where a token uses fewer."""
    weight_NLK: Floats | None
    """None: not known."""
    lore_NLKU: Counts | None
    """The LoREs inside each chosen expert; -1 where there is none. None: there are no LoREs."""
    starts: list[int] = field(default_factory=list)
    """Places in N where a new text begins: a pair across it is no pair."""


@dataclass(frozen=True)
class Overload:
    """Expert parallelism: if R processes had equal blocks of the experts, how much more than the mean the busiest one would receive. 1 is even."""

    processes: list[int]
    batch_tokens: int
    """Tokens that are sent at once."""
    mean_LR: Floats
    """Mean over the batches of max/mean. NaN where the experts do not divide."""
    worst_LR: Floats
    """The worst batch."""
    whole_LR: Floats
    """Of all tokens as one batch."""


@dataclass(frozen=True)
class LoreFindings:
    """One level down: the LoREs within each expert of a StructMoE. NaN for an expert without rows."""

    num_lores: int
    """M."""
    per_token: int
    """U."""
    count_GLEM: Counts
    """Rows of each LoRE."""
    entropy_GLE: Floats
    """Entropy of the shares within the expert over log M: 1 is even."""
    delta_uniform_GLE: Floats
    """Mean over the LoREs of |share - 1/M|."""
    dead_GLE: Counts
    """LoREs without a row, of an expert that has rows; 0 for an expert without rows."""
    random_dead_GLE: Floats
    """How many would have none if every row chose at random: M (1 - U/M)^rows."""
    coverage_GLE: Floats
    """The share of the expert's LoREs that 90 % of its choices need, the most used first. 0.9 or more is even."""
    together_LEMM: Floats | None
    """[i, j]: the share of the rows of LoRE i that LoRE j got as well (NaN on the diagonal). None: one LoRE for each row, or too many for a file."""
    random_together: float
    """(U - 1) / (M - 1)."""
    repeat_GL: Floats
    """Of consecutive tokens with the same expert, the share that has a LoRE of it in common. NaN without such pairs."""
    random_repeat: float
    """1 - C(M-U, U) / C(M, U)."""


@dataclass(frozen=True)
class Model:
    """One model, or one trace."""

    name: str
    """For people, and different for each model of a report."""
    source: str
    """The path that was given."""
    kind: str
    """checkpoint, huggingface or trace."""
    iteration: int | None
    """None: not known."""
    layers: list[int]
    """L. The numbers of the layers with experts."""
    experts_L: list[int]
    top_k: int
    """K."""
    experts_per_token: float
    """Mean; less than K where a router chooses the number."""
    groups: list[str]
    """G. The domains, and ALL if there is more than one."""
    tokens_G: Counts
    load: Load
    repeats: Repeats
    locality: Locality
    overload: Overload
    co_activation: CoActivation | None
    """None: one expert for each token."""
    specialisation: Specialisation
    samples: list[Sample]
    lores: LoreFindings | None
    """None: the model has no LoREs."""
    seconds: float = 0.0
    """That the analysis took."""


@dataclass(frozen=True)
class Saturation:
    """How early the routers decide (OLMoE, section 5.1; FLAME-MoE, arXiv 2505.20225): the share of the last checkpoint's choices that an earlier one
    makes already, for the same tokens."""

    names: list[str]
    """S. The checkpoints, earliest first; the last one is what the others are compared with."""
    iterations: list[int | None]
    layers: list[int]
    tokens: int
    """That were compared."""
    share_SL: Floats
    """Mean of |experts of the checkpoint and of the last| / k; 1 for the last."""
    first_SL: Floats
    """Share of tokens with the same first choice."""
    random_L: Floats
    """k/E."""


@dataclass(frozen=True)
class Findings:
    """Everything that one run of `tools/analysis/routing.py` found."""

    models: list[Model]
    saturation: Saturation | None = None
    """None: there is one model, or their layers or tokens are not the same."""
    notes: list[str] = field(default_factory=list)
    """Sentences that a reader of the report should know: what was left out, and why."""
    format: int = FORMAT
