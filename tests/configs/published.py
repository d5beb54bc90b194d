"""Parameter counts as their authors published them, each with the place where it stands."""

from __future__ import annotations

from typing import Literal, NamedTuple

Counted = Literal["all", "outside the embeddings", "embeddings once", "active", "experts"]


class Published(NamedTuple):
    """A published figure: which parameters it counts, and the relative tolerance (0: exact) that its rounding asks for."""

    figure: float
    counted: Counted
    tolerance: float
    source: str


def exact(figure: int, source: str, counted: Counted = "all") -> Published:
    return Published(figure, counted, 0.0, source)


PYTHIA = "model cards of EleutherAI/pythia-*"
GPT3 = "Brown et al. 2020, arXiv:2005.14165, table 2.1: two or three digits, the embeddings (also the head) counted once"
LLAMA = "Touvron et al. 2023, arXiv:2302.13971, table 2, to the digit in the weights of the Hugging Face conversions"
LLAMA2 = "weights of meta-llama/Llama-2-*-hf"
LLAMA3 = "weights of meta-llama/Meta-Llama-3-*"
CODE_LLAMA = "weights of codellama/CodeLlama-*-hf"
STRUCTMOE = "Sarwar et al. 2024, StructMoE, section 4.1 and figures 2 to 5"
COSMOES = "Huber et al. 2025, CoSMoEs, table 1"

# Experts of StructMoE's baselines; "parameter matched" is a statement about experts, LoREs included.
EXPERTS_13 = 24 * 13 * 2 * 1024 * 4096
EXPERTS_10 = 12 * 10 * 2 * 768 * 3072


def cosmoes(total: float, active: float | None = None) -> list[Published]:
    return [Published(total, "all", 0.01, COSMOES), *([Published(active, "active", 0.01, COSMOES)] if active else [])]


FIGURES: dict[str, list[Published]] = {
    "pythia/14M.yml": [exact(14_067_712, "weights of EleutherAI/pythia-14m")],
    "pythia/31M.yml": [exact(30_494_720, "weights of EleutherAI/pythia-31m")],
    "pythia/70M.yml": [exact(70_426_624, PYTHIA), exact(18_915_328, PYTHIA, "outside the embeddings")],
    "pythia/160M.yml": [exact(162_322_944, PYTHIA), exact(85_056_000, PYTHIA, "outside the embeddings")],
    "pythia/410M.yml": [exact(405_334_016, PYTHIA), exact(302_311_424, PYTHIA, "outside the embeddings")],
    "pythia/1B.yml": [exact(1_011_781_632, PYTHIA), exact(805_736_448, PYTHIA, "outside the embeddings")],
    "pythia/1.4B.yml": [exact(1_414_647_808, PYTHIA), exact(1_208_602_624, PYTHIA, "outside the embeddings")],
    "pythia/2.8B.yml": [exact(2_775_208_960, PYTHIA), exact(2_517_652_480, PYTHIA, "outside the embeddings")],
    "pythia/6.9B.yml": [exact(6_857_302_016, PYTHIA), exact(6_444_163_072, PYTHIA, "outside the embeddings")],
    "pythia/12B.yml": [exact(11_846_072_320, PYTHIA), exact(11_327_027_200, PYTHIA, "outside the embeddings")],
    "finetuning/pythia-410M.yml": [exact(405_334_016, PYTHIA)],
    "19M.yml": [exact(18_915_328, PYTHIA, "outside the embeddings")],
    "49M.yml": [Published(49e6, "outside the embeddings", 0.01, "its name in GPT-NeoX")],
    "160M.yml": [exact(162_322_944, PYTHIA)],
    "410M.yml": [exact(405_334_016, PYTHIA)],
    "800M.yml": [exact(805_736_448, PYTHIA, "outside the embeddings")],
    "1-4B.yml": [exact(1_414_647_808, PYTHIA)],
    "2-8B.yml": [exact(2_775_208_960, PYTHIA)],
    "125M.yml": [Published(125e6, "embeddings once", 0.02, GPT3)],
    "350M.yml": [Published(350e6, "embeddings once", 0.02, GPT3)],
    "760M.yml": [Published(760e6, "embeddings once", 0.02, GPT3)],
    "1-3B.yml": [Published(1.3e9, "embeddings once", 0.02, GPT3)],
    "2-7B.yml": [Published(2.7e9, "embeddings once", 0.02, GPT3)],
    "6-7B.yml": [Published(6.7e9, "embeddings once", 0.02, GPT3)],
    "13B.yml": [Published(13.0e9, "embeddings once", 0.02, GPT3)],
    "175B.yml": [Published(175.0e9, "embeddings once", 0.005, GPT3)],
    "20B.yml": [exact(20_554_567_680, "Black et al. 2022, arXiv:2204.06745, and the model card of EleutherAI/gpt-neox-20b")],
    "125M-dmoe.yml": [Published(125e6 + 7 * 12 * 2 * 768 * 3072, "embeddings once", 0.01, "GPT 125M with seven more MLPs in each of 12 layers")],
    "llama/7B.yml": [exact(6_738_415_616, LLAMA), Published(6.7e9, "all", 0.01, LLAMA)],
    "llama/13B.yml": [exact(13_015_864_320, LLAMA), Published(13.0e9, "all", 0.01, LLAMA)],
    "llama/30B.yml": [exact(32_528_943_616, LLAMA), Published(32.5e9, "all", 0.01, LLAMA)],
    "llama/65B.yml": [exact(65_285_660_672, LLAMA), Published(65.2e9, "all", 0.01, LLAMA)],
    "llama2/7B.yml": [exact(6_738_415_616, LLAMA2)],
    "llama2/13B.yml": [exact(13_015_864_320, LLAMA2)],
    "llama2/70B.yml": [exact(68_976_648_192, LLAMA2)],
    "llama3/8B.yml": [exact(8_030_261_248, LLAMA3)],
    "llama3/70B.yml": [exact(70_553_706_496, LLAMA3)],
    "llama3.1/405B.yml": [exact(405_853_388_800, "weights of meta-llama/Llama-3.1-405B")],
    "llama3.2/1B.yml": [exact(1_235_814_400, "weights of meta-llama/Llama-3.2-1B"), Published(1.23e9, "all", 0.01, "its model card")],
    "llama3.2/3B.yml": [exact(3_212_749_824, "weights of meta-llama/Llama-3.2-3B"), Published(3.21e9, "all", 0.01, "its model card")],
    "codellama/7B.yml": [exact(6_738_546_688, CODE_LLAMA)],
    "codellama/13B.yml": [exact(13_016_028_160, CODE_LLAMA)],
    "codellama/34B.yml": [exact(33_743_970_304, CODE_LLAMA)],
    "mistral/7B.yml": [exact(7_241_732_096, "weights of mistralai/Mistral-7B-v0.1")],
    "mixtral/8x7B.yml": [
        exact(46_702_792_704, "weights of mistralai/Mixtral-8x7B-v0.1"),
        Published(46.7e9, "all", 0.001, "Mistral AI's announcement of December 2023"),
        Published(12.9e9, "active", 0.005, "Mistral AI's announcement of December 2023"),
    ],
    # 32 LoREs of rank 64 match 13 and 10 experts with no whole number of experts: the heads of the files say what the paper's totals could mean.
    "structmoe/410M-2B-fineweb.yml": [Published(EXPERTS_13, "experts", 0.05, STRUCTMOE)],
    "structmoe/410M-13experts-fineweb.yml": [exact(EXPERTS_13, STRUCTMOE, "experts")],
    "structmoe/410M-matched-8x8x128.yml": [Published(EXPERTS_13, "experts", 0.001, f"{STRUCTMOE}: exactly, but for the routers of the LoREs")],
    "structmoe/125M-710M-redpajama.yml": [Published(EXPERTS_10, "experts", 0.07, STRUCTMOE), Published(710e6, "all", 0.04, STRUCTMOE)],
    "structmoe/125M-10experts-redpajama.yml": [exact(EXPERTS_10, STRUCTMOE, "experts")],
    "structmoe/125M-710M-router-free.yml": [Published(EXPERTS_10, "experts", 0.07, STRUCTMOE), Published(710e6, "all", 0.041, STRUCTMOE)],
    "structmoe/125M-710M-non-entangled.yml": [Published(EXPERTS_10, "experts", 0.07, STRUCTMOE), Published(710e6, "all", 0.04, STRUCTMOE)],
    "cosmoes/phone-dense-flop.yml": cosmoes(1.50e9),
    "cosmoes/phone-moe.yml": cosmoes(3.75e9, 1.37e9),
    "cosmoes/phone-moe-bles.yml": cosmoes(3.75e9, 1.37e9),
    "cosmoes/phone-moe-wd.yml": cosmoes(3.65e9, 1.42e9),
    "cosmoes/phone-dense-param.yml": cosmoes(3.61e9),
    "cosmoes/wearable-dense-flop.yml": cosmoes(189e6),
    "cosmoes/wearable-moe.yml": cosmoes(377e6, 188e6),
    "cosmoes/wearable-moe-bles.yml": cosmoes(377e6, 188e6),
    "cosmoes/wearable-moe-wd.yml": [Published(377e6, "all", 0.012, COSMOES), Published(188e6, "active", 0.01, COSMOES)],
    "cosmoes/wearable-dense-param.yml": cosmoes(380e6),
    "moe/deepseekmoe-2B.yml": [
        Published(2.0e9, "all", 0.025, "Dai et al. 2024, arXiv:2401.06066, section 4.1: two digits"),
        Published(0.3e9, "active", 0.17, "Dai et al. 2024, arXiv:2401.06066, section 4.1: one digit"),
    ],
    "moe/olmoe-1B-7B.yml": [
        Published(6_919_161_856, "all", 1e-5, "weights of allenai/OLMoE-1B-7B-0924, which normalise queries and keys over all heads"),
        Published(1.28e9, "active", 0.01, "model card of allenai/OLMoE-1B-7B-0924: 1.3B"),
    ],
    "moe/switch-base-8.yml": [
        Published(12 * 4 * 768**2 + 54 * 2 * 768 * 3072, "outside the embeddings", 0.001, "google/switch-base-8, one of its two stacks"),
    ],
}

# Tokens of the tokenizers that the heads of the files name.
VOCABULARIES = {
    "GPT-2": 50_257,
    "GPT-NeoX-20B": 50_277,
    "Llama": 32_000,
    "Code Llama": 32_016,
    "Llama 3": 128_256,
    "Mistral": 32_000,
    "sotu": 8_192,
    "sotu2k": 2_048,
    "DeepSeekMoE": 8_192,
    "T5": 32_100,
}
