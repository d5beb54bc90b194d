"""A directory of Hugging Face's as a RoutedModel. transformers computes; hooks see what its routers hand to the experts.

All mixtures of experts of transformers 5 (Mixtral, OLMoE, Qwen-MoE, DeepSeek V2 and V3, gpt-oss and others) call a module of experts with
(hidden states, indices, weights), so no list of architectures is needed. Our own exports hand over rows instead; their routers are seen.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from megatron.analysis.routing.blocks import Pieces
from megatron.analysis.routing.number_format import to_fast_format
from megatron.analysis.routing.routed_model import Kind, RoutedModelError, name_of
from megatron.analysis.routing.tally import Origin
from megatron.convert.architectures import ARCHITECTURES
from megatron.convert.json_files import read_json
from megatron.convert.tensor_files import StoredTensors
from megatron.convert.trust import OPTION, own_class, without_code
from megatron.monitor.trace_layers import LayerChoices, Routed, joined

INDICES, WEIGHTS = ("top_k_index", "router_indices"), ("top_k_weights", "routing_weights")
"""What the modules of experts call their arguments."""
UNLIMITED = 1 << 20


class Seen(NamedTuple):
    """A module that is told the choices, and the number of its layer and of its experts."""

    layer: int
    module: nn.Module
    num_experts: int
    attach: Callable[[nn.Module, Callable[[LayerChoices], None]], None]


class HuggingFaceModel:
    """See RoutedModel."""

    def __init__(self, model: Any, tokenizer: Any, source: Path) -> None:
        """Raises RoutedModelError for a model without experts."""
        self._body, self._tokenizer = model.base_model, tokenizer
        seen = sorted(_seen(self._body), key=lambda part: part.layer)
        if not seen:
            raise RoutedModelError(
                f"{source} ({type(model).__name__}) has no experts that transformers {_version()} names as such, so there is no routing to look at."
            )
        self._latest: dict[int, LayerChoices] = {}
        for part in seen:
            part.attach(part.module, lambda choices, layer=part.layer: self._latest.__setitem__(layer, choices))  # type: ignore[misc]
        self._layers = [part.layer for part in seen]
        self.origin = Origin(name_of(source, None), str(source), "huggingface")
        self.context = int(getattr(model.config.get_text_config(), "max_position_embeddings", None) or UNLIMITED)
        self.end: int | None = tokenizer.eos_token_id
        first = self._run(np.zeros((1, 8), np.int64))
        widths = [layer.lore_TKU.shape[2] for layer in first if layer.lore_TKU is not None]
        lores = int(getattr(model.config, "num_lores", 0)) if widths else 0
        top_k = max(layer.expert_TK.shape[1] for layer in first)
        self.kind = Kind(self._layers, [part.num_experts for part in seen], top_k, lores, max(widths, default=0))

    def encode(self, text: str) -> list[int]:
        """See RoutedModel."""
        return [int(token) for token in self._tokenizer.encode(text, add_special_tokens=False, verbose=False)]

    def pieces(self, tokens: Iterable[int]) -> Pieces:
        """See RoutedModel."""
        return {token: "<end>" if token == self.end else str(self._tokenizer.decode([token])) for token in tokens}

    def route(self, token_BS: npt.NDArray[np.int64]) -> Routed:
        """See RoutedModel."""
        return joined(self._run(token_BS))

    @torch.inference_mode()
    def _run(self, token_BS: npt.NDArray[np.int64]) -> list[LayerChoices]:
        self._latest.clear()
        device = next(self._body.parameters()).device
        self._body(input_ids=torch.from_numpy(token_BS).to(device), use_cache=False)
        return [self._latest[layer] for layer in self._layers]


def _seen(body: nn.Module) -> Iterable[Seen]:
    for name, module in body.named_modules():
        number = re.search(r"(?:^|\.)(\d+)\.", name)
        if number is None:
            continue
        names = inspect.signature(module.forward).parameters
        if any(index in names for index in INDICES):
            yield Seen(int(number[1]), module, int(module.num_experts), _attach_experts)
        elif type(module).__name__ == "StructMoESparseMoeBlock":
            yield Seen(int(number[1]), module, int(module.gate.num_experts), _attach_block)


def _attach_experts(module: nn.Module, tell: Callable[[LayerChoices], None]) -> None:
    signature = inspect.signature(module.forward)
    experts = int(module.num_experts)  # type: ignore[arg-type]

    def before(_: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        bound = signature.bind(*given, **named).arguments
        index_TK, weight_TK = (next(bound[name] for name in known if name in bound) for known in (INDICES, WEIGHTS))
        expert_TK = _array(index_TK.flatten(0, -2))
        weight_TK = weight_TK.flatten(0, -2)
        if weight_TK.shape[-1] != expert_TK.shape[-1]:  # a weight for every expert
            weight_TK = weight_TK.gather(-1, index_TK.flatten(0, -2))
        tell(LayerChoices(np.where(expert_TK < experts, expert_TK, -1), _array(weight_TK.float())))

    module.register_forward_pre_hook(before, with_kwargs=True)


def _attach_block(block: nn.Module, tell: Callable[[LayerChoices], None]) -> None:
    """A mixture of experts of our own export: its gate says the experts of each token, the experts' second routers the LoREs of each row."""
    found: dict[str, Any] = {}
    gate: Any = block.gate

    def gated(_: nn.Module, __: Any, routing: Any) -> None:
        found["routing"] = routing

    def chosen(module: nn.Module, __: Any, choice: Any) -> None:
        found["lores"] = _lores_of(choice, int(module.weight.shape[1]))  # type: ignore[index]

    def after(*_: Any) -> None:
        routing, lore_RL = found.pop("routing"), found.pop("lores", None)
        expert_TK = routing.expert_TK.where(routing.expert_TK < gate.num_experts, -1)
        lores = None if lore_RL is None else _array(_by_token(lore_RL, routing.expert_TK, expert_TK))
        tell(LayerChoices(_array(expert_TK), _array(routing.weight_TK.float()), lores))

    gate.register_forward_hook(gated)
    for module in block.modules():
        if type(module).__name__ == "LoreRouter":
            module.register_forward_hook(chosen)
    block.register_forward_hook(after)


def _lores_of(choice: Any, per_expert: int) -> Tensor:
    """lore_RL from the order of a LoreChoice: the group of each place, of which an expert has `per_expert`."""
    place_RL = choice.order.place_TK
    group_RL = torch.searchsorted(choice.order.ends_G.to(torch.int64), place_RL.to(torch.int64).contiguous(), right=True)
    return group_RL % per_expert


def _by_token(lore_RL: Tensor, key_TK: Tensor, expert_TK: Tensor) -> Tensor:
    """lore_TKL: rows lie sorted by expert, and of one expert by token and place; rows of empty places are missing."""
    order_R = key_TK.flatten().argsort(stable=True)
    lore_TKL = lore_RL.new_full((expert_TK.numel(), lore_RL.shape[1]), -1)
    lore_TKL[order_R[: len(lore_RL)]] = lore_RL
    return lore_TKL.view(*expert_TK.shape, -1).where(expert_TK[..., None] >= 0, -1)


def _array(tensor: Tensor) -> npt.NDArray[Any]:
    found: npt.NDArray[Any] = tensor.detach().cpu().numpy()
    return found


def open_directory(path: Path, *, trusted: bool = False) -> HuggingFaceModel:
    """`path`: a folder with config.json, weights and a tokenizer. `trusted`: Python code that lies in it may run.

    Raises RoutedModelError and ConversionError.
    """
    import transformers

    settings = read_json(path / "config.json")
    if settings.get("quantization_config"):
        raise RoutedModelError(f"{path} holds quantized weights (quantization_config). Give the model before quantization.")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        model = _load(path, settings, trusted=trusted)
        tokenizer = transformers.AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=trusted)
    except (OSError, ValueError, ImportError, KeyError) as error:
        reason = " ".join(str(error).split())[:300]
        raise RoutedModelError(f"transformers {_version()} cannot load {path}: {reason}") from error
    to_fast_format(model.eval().requires_grad_(False))
    return HuggingFaceModel(model, tokenizer, path)


def _load(path: Path, settings: dict[str, Any], *, trusted: bool) -> Any:
    """The model of a folder whose own code runs only with consent."""
    import transformers

    if trusted:
        return transformers.AutoModelForCausalLM.from_pretrained(path, dtype="auto", local_files_only=True, trust_remote_code=True)
    names = settings.get("architectures") or []
    known = next((architecture for architecture in ARCHITECTURES.values() if architecture.class_name in names), None)
    kind = transformers.AutoModelForCausalLM if known is None else own_class(known)
    if known is None and settings.get("model_type") not in transformers.CONFIG_MAPPING:
        raise RoutedModelError(
            f"{path}: transformers {_version()} does not know model_type {settings.get('model_type')!r}. If the folder holds Python code for it that "
            f"you trust, add {OPTION}."
        )
    with without_code(StoredTensors(path)) as folder:
        return kind.from_pretrained(folder, dtype="auto", local_files_only=True)


def _version() -> str:
    import transformers

    return str(transformers.__version__)
