"""What the hooks see is what transformers' own routers say; a checkpoint and its export route alike."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from megatron.analysis.routing.huggingface_model import HuggingFaceModel, open_directory
from megatron.analysis.routing.our_model import found_beside, open_checkpoint
from megatron.analysis.routing.routed_model import RoutedModelError
from megatron.checkpoint.save import resolved_config_document
from megatron.checkpoint.save_weights import Division, save_weights
from megatron.config import NeoXConfig, config_from_dict
from megatron.config.size import padded_vocab_size
from megatron.convert.to_huggingface import Export, export_checkpoint
from megatron.data.progress import build_reporter
from megatron.model.gpt import GPT, build_model
from megatron.testing.tiny import TINY_DENSE, TINY_MOE, TINY_STRUCTMOE
from megatron.training.setup import checkpoint_args
from tests.analysis.routing.conftest import VOCABULARY
from tests.inference.conftest import LIVELY, write_checkpoint

TOKENS = np.random.default_rng(5).integers(1, 270, (3, 20))
BASE: Mapping[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "pad_token_id": None,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
DEEPSEEK: Mapping[str, Any] = {
    **BASE,
    "num_key_value_heads": 4,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
}
QWEN: Mapping[str, Any] = {**BASE, "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
WITH_LOGITS: dict[str, tuple[str, Mapping[str, Any], int]] = {
    "mixtral": ("MixtralConfig", {**BASE, "num_local_experts": 6, "num_experts_per_tok": 2}, 2),
    "olmoe": ("OlmoeConfig", {**BASE, "num_experts": 8, "num_experts_per_tok": 3}, 3),
    "qwen2": ("Qwen2MoeConfig", {**QWEN, "shared_expert_intermediate_size": 16}, 2),
    "qwen3": ("Qwen3MoeConfig", {**QWEN, "head_dim": 8}, 2),
}
OTHERS: dict[str, tuple[str, Mapping[str, Any]]] = {
    "deepseek v2": ("DeepseekV2Config", {**DEEPSEEK, "n_group": 1, "topk_group": 1}),
    "deepseek v3": ("DeepseekV3Config", {**DEEPSEEK, "n_group": 4, "topk_group": 2}),
    "gpt-oss": ("GptOssConfig", {**BASE, "num_local_experts": 8, "num_experts_per_tok": 2, "head_dim": 8}),
}


@pytest.fixture
def directory(tmp_path: Path, tokenizer_file: Path) -> Callable[[str, Mapping[str, Any]], tuple[Path, Any]]:
    """Writes a model with random weights, and gives its folder and itself."""

    def write(name: str, settings: Mapping[str, Any]) -> tuple[Path, Any]:
        import transformers

        torch.manual_seed(3)
        model: Any = transformers.AutoModelForCausalLM.from_config(getattr(transformers, name)(**settings)).eval()
        model.save_pretrained(tmp_path / "model")
        transformers.PreTrainedTokenizerFast(tokenizer_file=str(tokenizer_file), eos_token="<|endoftext|>").save_pretrained(tmp_path / "model")
        return tmp_path / "model", model

    return write


@pytest.mark.parametrize("name", WITH_LOGITS)
def test_choices_are_the_largest_of_the_router_logits(name: str, directory: Callable[..., tuple[Path, Any]]) -> None:
    config, settings, top_k = WITH_LOGITS[name]
    path, model = directory(config, settings)
    opened = open_directory(path)
    with torch.inference_mode():
        logits = model(input_ids=torch.from_numpy(TOKENS), output_router_logits=True).router_logits
    expected = np.stack([layer.float().topk(top_k, dim=-1).indices.numpy() for layer in logits], 1)
    routed = opened.route(TOKENS)
    assert routed.expert_TLK.tolist() == expected.tolist()
    assert (np.diff(routed.weight_TLK, axis=-1) <= 0).all()
    assert len(np.unique(routed.expert_TLK)) > top_k
    assert opened.kind.top_k == top_k
    assert opened.kind.layers == [0, 1, 2]


@pytest.mark.parametrize("name", OTHERS)
def test_choices_are_what_the_gate_returns(name: str, directory: Callable[..., tuple[Path, Any]]) -> None:
    config, settings = OTHERS[name]
    path, model = directory(config, settings)
    gates, seen = [module for module in model.modules() if type(module).__name__.lower().endswith("topkrouter")], []
    for gate in gates:
        gate.register_forward_hook(lambda _, __, output: seen.append(output))
    with torch.inference_mode():
        model(input_ids=torch.from_numpy(TOKENS))
    opened = open_directory(path)
    assert len(seen) == len(opened.kind.layers) == (3 if name == "gpt-oss" else 2)
    routed = opened.route(TOKENS)
    for place, (_, weights, indices) in enumerate(seen):
        assert np.sort(routed.expert_TLK[:, place], -1).tolist() == indices.view(60, -1).sort(-1).values.tolist()
        assert routed.weight_TLK[:, place].sum(-1).tolist() == pytest.approx(weights.view(60, -1).sum(-1).tolist(), rel=1e-5)
    assert opened.kind.experts_L == [8] * len(seen)


def test_texts_of_a_batch_do_not_see_each_other(directory: Callable[..., tuple[Path, Any]]) -> None:
    opened = open_directory(directory("MixtralConfig", WITH_LOGITS["mixtral"][1])[0])
    together, alone = opened.route(TOKENS), opened.route(TOKENS[1:2])
    assert together.expert_TLK[20:40].tolist() == alone.expert_TLK.tolist()
    assert (opened.context, opened.end) == (64, 0)
    text = "the routing of a text: naïve"
    assert "".join(opened.pieces([token])[token] for token in opened.encode("the text")) == "the text"
    assert opened.encode(text)


OURS: dict[str, Mapping[str, Any]] = {
    "structmoe": {**TINY_STRUCTMOE, "moe_num_experts": 6},
    "one lore": {**TINY_STRUCTMOE, "moe_lore_top_k": 1, "moe_top_k": 1},
    "top p": {**TINY_STRUCTMOE, "moe_router_type": "top_p", "moe_top_k": None, "moe_router_top_p": 0.6},
    "unrouted": {**TINY_STRUCTMOE, "moe_lore_routed": False},
    "mixtral-like": {**TINY_MOE, "activation": "swiglu", "norm": "rmsnorm"},
}


def config_and_model(keys: Mapping[str, Any], tokenizer_file: Path) -> tuple[NeoXConfig, GPT]:
    given = {**keys, **LIVELY, "tokenizer_type": "HFTokenizer", "vocab_file": str(tokenizer_file), "make_vocab_size_divisible_by": 4}
    config = config_from_dict({key: value for key, value in given.items() if value is not None})
    vocabulary = padded_vocab_size(Tokenizer.from_file(str(tokenizer_file)).get_vocab_size(), 4)
    return config, build_model(config.model, config.moe, vocabulary, seed=3)


def checkpoint(folder: Path, keys: Mapping[str, Any], tokenizer_file: Path) -> Path:
    write_checkpoint(folder / "run", *config_and_model(keys, tokenizer_file))
    return folder / "run"


@pytest.mark.parametrize("name", OURS)
def test_a_checkpoint_and_its_export_route_alike(name: str, tmp_path: Path, tokenizer_file: Path) -> None:
    run = checkpoint(tmp_path, OURS[name], tokenizer_file)
    ours = open_checkpoint(run)
    export_checkpoint(Export(run, tmp_path / "exported"), build_reporter(quiet=True))
    theirs: HuggingFaceModel = open_directory(tmp_path / "exported")
    one, other = ours.route(TOKENS), theirs.route(TOKENS)
    width = min(one.expert_TLK.shape[2], other.expert_TLK.shape[2])
    assert one.expert_TLK[..., :width].tolist() == other.expert_TLK[..., :width].tolist()
    assert one.weight_TLK[..., :width].ravel().tolist() == pytest.approx(other.weight_TLK[..., :width].ravel().tolist(), abs=1e-5)
    assert (one.expert_TLK[..., width:] == -1).all()
    assert (one.lore_TLKU is None) == (name in ("unrouted", "mixtral-like"))
    if one.lore_TLKU is not None:
        assert other.lore_TLKU is not None
        assert np.sort(one.lore_TLKU[:, :, :width]).tolist() == np.sort(other.lore_TLKU[:, :, :width]).tolist()
        assert ours.kind.num_lores == theirs.kind.num_lores == 4
    assert ours.kind.experts_L == theirs.kind.experts_L
    assert ours.origin.iteration == 2
    assert ours.encode("the text") == theirs.encode("the text")


def test_a_checkpoint_of_a_run_with_several_processes(tmp_path: Path, tokenizer_file: Path) -> None:
    """Cut up among tensor-parallel processes, and with a configuration that asks for them: it is read into one process all the same."""
    alone = open_checkpoint(checkpoint(tmp_path, TINY_MOE, tokenizer_file))
    keys = {**TINY_MOE, "model_parallel_size": 2, "sequence_parallel": True, "kernel_backends": {"grouped_gemm": "triton"}}
    config, gpt = config_and_model(keys, tokenizer_file)
    state = {"iteration": 3, "args": {**checkpoint_args(config, gpt.vocab_size), "model_parallel_size": 2}}
    documents, division = resolved_config_document(config.flat()), Division(tensor_parallel=2)
    path = save_weights(tmp_path / "cut", gpt.state_dict().items(), client_state=state, documents=documents, division=division)
    cut = open_checkpoint(path)
    assert cut.route(TOKENS).expert_TLK.tolist() == alone.route(TOKENS).expert_TLK.tolist()
    assert cut.origin.iteration == 3


def test_what_has_no_routing(tmp_path: Path, tokenizer_file: Path, directory: Callable[..., tuple[Path, Any]]) -> None:
    with pytest.raises(RoutedModelError, match="is a dense model: it has no experts"):
        open_checkpoint(checkpoint(tmp_path, TINY_DENSE, tokenizer_file))
    path, _ = directory("LlamaConfig", BASE)
    with pytest.raises(RoutedModelError, match=r"model \(LlamaForCausalLM\) has no experts"):
        open_directory(path)
    (path / "config.json").write_text('{"model_type": "invented", "auto_map": {"AutoModelForCausalLM": "x.Y"}}')
    with pytest.raises(RoutedModelError, match=r"does not know model_type 'invented'.* add --trust-remote-code"):
        open_directory(path)
    (path / "config.json").write_text('{"model_type": "mixtral", "quantization_config": {"bits": 4}}')
    with pytest.raises(RoutedModelError, match="quantized weights"):
        open_directory(path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "config.json").write_text('{"model_type": "mixtral"}')
    with pytest.raises(RoutedModelError, match="empty holds no weights"):
        open_directory(tmp_path / "empty")


def test_a_tokenizer_is_found_from_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "project" / "data").mkdir(parents=True)
    (tmp_path / "project" / "data" / "tokenizer.json").write_text("{}")
    path = tmp_path / "project" / "runs" / "a" / "global_step2"
    monkeypatch.chdir(tmp_path)
    assert found_beside(path, "data/tokenizer.json") == str(tmp_path / "project" / "data" / "tokenizer.json")
    assert found_beside(path, "missing.json") == "missing.json"
    monkeypatch.chdir(tmp_path / "project")
    assert found_beside(path, "data/tokenizer.json") == "data/tokenizer.json"
