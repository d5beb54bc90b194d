"""What is wrong with an optimizer or a schedule is said with its place."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron.config.loader import config_from_dict, load_config
from megatron.config.section import ConfigError

MODEL = {"num_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "seq_length": 32, "max_position_embeddings": 32}


def problems_of(keys: dict[str, Any]) -> list[str]:
    with pytest.raises(ConfigError) as raised:
        config_from_dict({**MODEL, **keys})
    return raised.value.problems


def spec(kind: str, **params: Any) -> dict[str, Any]:
    return {"optimizer": {"type": kind, "params": {"lr": 1e-3, **params}}}


INFINITE = {**spec("Adam"), "lr_decay_style": "infinite_cosine", "min_lr": 1e-5, "constant_lr": 1e-4}
CASES: list[tuple[dict[str, Any], str]] = [
    (spec("Lion", eps=1e-8), "'optimizer.params.eps' = 1e-08: is not a setting of Lion; Lion takes lr, betas"),
    (spec("AdamW", adam_w_mode=False), "'optimizer.params.adam_w_mode' = false: is not a setting of AdamW; AdamW takes lr, betas, eps"),
    (spec("SGD", betas=[0.9, 0.95]), "'optimizer.params.betas' = (0.9, 0.95): is not a setting of SGD; SGD takes lr, momentum, nesterov"),
    (spec("SGD", nesterov=True), "'optimizer.params.nesterov' = true: needs momentum above 0"),
    (
        {"optimizer": {"type": "SGD", "implementation": "apex"}},
        "'optimizer.implementation' = 'apex': is for Adam and AdamW; remove it for SGD",
    ),
    ({**spec("Lion"), "use_bnb_optimizer": True}, "'use_bnb_optimizer' = true: needs optimizer.type Adam, not Lion"),
    (
        {"override_lr_scheduler": True, "use_checkpoint_lr_scheduler": True},
        "'use_checkpoint_lr_scheduler' = true: contradicts override_lr_scheduler: true; keep one of them",
    ),
    ({"lr_decay_style": "wsd", "warmup": 0.5, "wsd_decay_ratio": 0.6}, "'wsd_decay_ratio' = 0.6: the sum with warmup (0.5) must be at most 1"),
    ({**INFINITE, "constant_lr": None}, "'constant_lr' = null: must be given with lr_decay_style: infinite_cosine"),
    ({**INFINITE, "constant_lr": 0.1}, "'constant_lr' = 0.1: must be between min_lr (1e-05) and optimizer.params.lr (0.001)"),
    (
        {**INFINITE, "cooldown_iters_perc": 0.6, "constant_iters_perc": 0.5},
        "'cooldown_iters_perc' = 0.6: the sum with warmup and constant_iters_perc is 1.11; it must be at most 1",
    ),
    ({**INFINITE, "min_lr": 0.0}, "'min_lr' = 0.0: must be above 0, because the annealing phase falls to it exponentially"),
]


@pytest.mark.parametrize(("keys", "sentence"), CASES, ids=[sentence.split("'")[1] for _, sentence in CASES])
def test_what_does_not_fit_is_a_sentence(keys: dict[str, Any], sentence: str) -> None:
    assert problems_of(keys) == [sentence]


@pytest.mark.parametrize("kind", ["OneBitAdam", "CPU_Adam", "CPU_torch_adam", "SM3", "madgrad_wd", "MuAdam", "MuAdamW", "MuSGD"])
def test_what_upstream_has_and_we_do_not_is_a_sentence(kind: str) -> None:
    (problem,) = problems_of({"optimizer": {"type": kind}})
    assert problem.startswith(f"'optimizer.type' = '{kind}': is not supported: ")
    assert "; use " in problem


def test_the_place_of_a_parameter(tmp_path: Path) -> None:
    file = tmp_path / "a.yml"
    lines = [f"{key}: {value}" for key, value in MODEL.items()]
    file.write_text("\n".join([*lines, "optimizer:", "  type: adam", "  params:", "    lr: 1e-3", "    momentum: 0.9", "    beta: [0.9, 0.95]"]))
    with pytest.raises(ConfigError) as raised:
        load_config([file])
    assert raised.value.problems == [
        f"{file}:11: unknown key 'beta' in 'optimizer.params'; did you mean 'betas'?; allowed: lr, betas, eps, adam_w_mode, momentum, nesterov"
    ]
    file.write_text(file.read_text().replace("    beta: [0.9, 0.95]", ""))
    with pytest.raises(ConfigError) as raised:
        load_config([file])
    assert raised.value.problems == [
        f"{file}:10: 'optimizer.params.momentum' = 0.9: is not a setting of Adam; Adam takes lr, betas, eps, adam_w_mode"
    ]


@pytest.mark.parametrize(
    ("keys", "averages"),
    [
        (spec("AdamW"), (2, 4)),
        (spec("SGD"), (0, 4)),
        (spec("SGD", momentum=0.9), (1, 4)),
        (spec("Lion"), (1, 4)),
        ({"use_bnb_optimizer": True}, (2, 1)),
    ],
)
def test_what_an_optimizer_keeps(keys: dict[str, Any], averages: tuple[int, int]) -> None:
    assert config_from_dict({**MODEL, **keys}).optimizer.averages == averages


def test_other_spellings_and_decimal_shares_are_accepted() -> None:
    assert config_from_dict({**MODEL, **spec("lion")}).optimizer.optimizer_settings == {"betas": (0.9, 0.99)}
    assert config_from_dict({**MODEL, **spec("ADAM", eps=1e-6)}).optimizer.optimizer_settings == {
        "betas": (0.9, 0.999),
        "eps": 1e-6,
        "adam_w_mode": True,
    }
    assert config_from_dict({**MODEL, "use_bnb_optimizer": True}).optimizer.optimizer_type == "Adam8bit"
    assert config_from_dict({**MODEL, **INFINITE, "min_lr": 0.0, "warmup": 0.01, "cooldown_iters_perc": 0.7, "constant_iters_perc": 0.29})
