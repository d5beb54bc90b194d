"""int8 weights: half the bytes of bfloat16 for every new token. Routers, norms, biases and the table of embeddings stay as they are."""

from __future__ import annotations

from torch import Tensor, nn

from megatron.config.model import ModelConfig
from megatron.inference.decoder.build import build_decoder
from megatron.kernels.decode.interface import Matrix
from megatron.kernels.decode.quantize import quantize_rows
from megatron.model import GPT


class Int8Store:
    """Keeps every weight that it is given in int8."""

    def __init__(self) -> None:
        self._places: set[int] = set()

    def __call__(self, weight: Tensor) -> Matrix:
        """The weight in int8."""
        self._places.add(weight.untyped_storage().data_ptr())
        return quantize_rows(weight.detach())

    def release(self, gpt: GPT) -> None:
        """Frees the memory of the weights that are kept in int8. The model's own modules cannot use them any more."""
        for module in gpt.modules():
            for parameter in module.parameters(recurse=False):
                if parameter.untyped_storage().data_ptr() in self._places and not isinstance(module, nn.Embedding):
                    parameter.data = parameter.data.new_empty(0)


def round_to_int8(gpt: GPT, model: ModelConfig, vocabulary: int) -> None:
    """Gives the model the numbers that its weights have in int8, in its own format. So its forward shows what int8 costs.

    Where the head is tied to the embeddings, those are rounded too, which generation does not do. Raises NotServed.
    """

    def store(weight: Tensor) -> Matrix:
        kept = quantize_rows(weight.detach())
        weight.data.copy_(kept.wide())
        return kept

    build_decoder(gpt, model, vocabulary, store)
