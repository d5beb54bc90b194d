"""The comparison of logits: what counts as rounding and what does not."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from megatron.convert.errors import ConversionError
from megatron.convert.logits import Allowed, Logits, compare, largest_difference, our_logits, their_logits
from tests.convert.models import CASES, config_of, lively_model, save_model, source_of


def model(in_float32: float, in_float64: float) -> Logits:
    """Logits that are everywhere the given number."""
    values = {torch.float32: in_float32, torch.float64: in_float64}
    return Logits(lambda dtype, _: [torch.full((1, length, 3), values[dtype], dtype=dtype) for length in (4, 5)])


def test_close_in_float32_needs_no_more() -> None:
    compared = compare(model(1.0, math.nan), model(1.00005, math.nan))
    assert compared.exact is None
    assert str(compared) == "largest difference of a logit 5.0e-05 on 4 tokens of a text and 5 random ones, in float32"


def test_float64_tells_rounding_from_mistakes() -> None:
    compared = compare(model(1.0, 1.0), model(1.0005, 1.00001))
    assert str(compared).endswith("in float32 (1.0e-05 in float64; the rest is rounding)")
    with pytest.raises(ConversionError, match=r"difference of a logit: 5\.0e-04 on .* in float32, 4\.0e-04 in float64, more than the 1e-04"):
        compare(model(1.0, 1.0), model(1.0005, 1.0004))


@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_what_is_no_number_is_no_agreement(wrong: float) -> None:
    for ours, theirs in ((wrong, 1.0), (1.0, wrong)):
        with pytest.raises(ConversionError, match="does not give the logits of the original"):
            compare(model(ours, ours), model(theirs, theirs))


@pytest.mark.parametrize("name", ["mixtral", "qwen3-moe", "qwen2-moe", "olmoe", "glm4-moe", "llama"])
def test_float64_is_computed_by_classes_with_experts_too(name: str, tmp_path: Path, export: Callable[..., Any]) -> None:
    """transformers' fused experts have no float64 on a CPU: a deep model of experts, whose float32 leaves it open, could not be converted."""
    gpt = lively_model(config_of(CASES[name][1]))
    export(save_model(tmp_path / "run", config_of(CASES[name][1]), gpt), tmp_path / "hf", save_tokenizer=False, check=False)
    texts = [torch.randint(90, (1, 40), generator=torch.Generator().manual_seed(1))]
    ours = our_logits(source_of(CASES[name][1]), gpt.state_dict().__getitem__, texts)
    theirs = their_logits(tmp_path / "hf", texts, precision=torch.float32, loader=transformers.AutoModelForCausalLM, allowed=Allowed())
    assert largest_difference(ours(torch.float64), theirs(torch.float64)) < 1e-4


def test_a_bias_that_stays_in_float32_is_compared_as_it_is(tmp_path: Path, export: Callable[..., Any]) -> None:
    """GLM-4.5's bias of the choice, after steps of training in bf16: rounded, it chooses other experts."""
    config = config_of({**CASES["glm4-moe"][1], "precision": "bfloat16"})
    gpt = lively_model(config, dtype=torch.bfloat16)
    for name, tensor in gpt.state_dict().items():
        if name.endswith("router.layer.weight"):
            tensor.zero_()
        elif name.endswith("balance.bias"):
            assert tensor.dtype == torch.float32
            tensor.copy_(0.5 + 1e-4 * torch.arange(len(tensor)))
            assert len(tensor.bfloat16().unique()) == 1
    exported = export(save_model(tmp_path / "run", config, gpt), tmp_path / "hf", save_tokenizer=False)
    assert (exported.class_name, exported.compared.exact) == ("Glm4MoeForCausalLM", None)
