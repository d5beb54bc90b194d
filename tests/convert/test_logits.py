"""The comparison of logits: what counts as rounding and what does not."""

from __future__ import annotations

import math

import pytest
import torch

from megatron.convert.errors import ConversionError
from megatron.convert.logits import Logits, compare


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
    with pytest.raises(ConversionError, match=r"difference of a logit 5\.0e-04 on .* in float32, 4\.0e-04 in float64, above the 1e-04"):
        compare(model(1.0, 1.0), model(1.0005, 1.0004))


@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_what_is_no_number_is_no_agreement(wrong: float) -> None:
    for ours, theirs in ((wrong, 1.0), (1.0, wrong)):
        with pytest.raises(ConversionError, match="does not give the logits of the original"):
            compare(model(ours, ours), model(theirs, theirs))
