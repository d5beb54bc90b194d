"""The routers that look beyond their own layer: at the documents of the tokens (EMO), and at what the router before them saw (RMoE)."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from megatron.model import build_cache
from megatron.model.gpt import InputError
from megatron.model.moe.surroundings import Surroundings, documents_of
from tests.contracts.test_routers import EXPERTS, TOKENS, build, hidden
from tests.model.test_routers import logits, softmax
from tests.model.tiny_model import model_section, moe_section, tiny_model, tokens

TEXT = torch.randint(48, (2, TOKENS // 2), generator=torch.Generator().manual_seed(5))
DOCUMENTS = torch.tensor([[4, 4, 4, 7, 7, 4, 4], [0, 1, 1, 1, 1, 1, 1]])
NUMBERS = [[0, 0, 0, 1, 1, 2, 2], [0, 1, 1, 1, 1, 1, 1]]


def pools(**keys: int) -> dict[str, int]:
    return {f"moe_{name}_document_expert_pool": size for name, size in keys.items()}


class TestDocuments:
    def test_a_border_is_where_the_number_changes(self) -> None:
        assert documents_of(TEXT, DOCUMENTS).number_BS.tolist() == NUMBERS
        assert not documents_of(TEXT, None).number_BS.any()

    def test_sums_over_a_document_and_up_to_a_token(self) -> None:
        documents = documents_of(TEXT, DOCUMENTS)
        value_BSE = torch.arange(28).view(2, 7, 2)
        for b, row in enumerate(NUMBERS):
            for s, number in enumerate(row):
                same = [i for i in range(7) if row[i] == number]
                assert documents.sums(value_BSE)[b, s].tolist() == sum(value_BSE[b, i] for i in same).tolist()
                earlier = sum(value_BSE[b, i] for i in same if i <= s)
                assert documents.running_sums(value_BSE, None)[b, s].tolist() == earlier.tolist()

    def test_the_hash_follows_from_the_document_alone(self) -> None:
        moved = documents_of(TEXT.roll(2, 1), DOCUMENTS.roll(2, 1)).drawn(3)
        assert torch.equal(moved[0, 5:], documents_of(TEXT, DOCUMENTS).drawn(3)[0, 3:5]), "the same tokens elsewhere in the row"
        texts = torch.randint(48, (400, 5), generator=torch.Generator().manual_seed(1))
        sizes = torch.stack([documents_of(texts, None).drawn(layer)[:, 0] % 4 for layer in range(20)])
        counts = sizes.flatten().bincount(minlength=4) / sizes.numel()
        assert (counts - 0.25).abs().max() < 0.02, "all sizes are about as frequent"
        assert (sizes[0] != sizes[1]).any(), "layers draw on their own"


class TestDocumentPool:
    @pytest.mark.parametrize("size", [2, 3, 5])
    def test_the_tokens_of_a_document_choose_from_one_pool(self, size: int) -> None:
        router = build("document_pool", **pools(min=size, max=size))
        routing = router(hidden(), Surroundings(documents=documents_of(TEXT, DOCUMENTS)))
        probability = softmax(logits(router)).reshape(2, 7, EXPERTS)
        for b, row in enumerate(NUMBERS):
            for s, number in enumerate(row):
                total = sum(probability[b, i] for i in range(7) if row[i] == number)
                pool = np.argsort(-total)[:size]
                best = sorted(pool, key=lambda e: -probability[b, s, e])[:2]
                assert routing.expert_TK.view(2, 7, 2)[b, s].tolist() == [int(e) for e in best]
                np.testing.assert_allclose(routing.weight_TK.view(2, 7, 2)[b, s].detach(), probability[b, s][best], rtol=1e-5)

    def test_sizes_are_between_the_limits(self) -> None:
        router = build("document_pool", **pools(min=2, max=4))
        texts = torch.randint(48, (300, 16), generator=torch.Generator().manual_seed(1))
        x_TD = torch.randn(300 * 16, 16, generator=torch.Generator().manual_seed(1))
        expert_BSK = router(x_TD, Surroundings(documents=documents_of(texts, None))).expert_TK.view(300, 16, 2)
        used = [len(document.unique()) for document in expert_BSK]
        assert (min(used), max(used)) == (2, 4)

    def test_outside_training_all_experts_are_allowed(self) -> None:
        router = build("document_pool", **pools(max=2)).eval()
        around = Surroundings(documents=documents_of(TEXT, DOCUMENTS))
        assert torch.equal(router(hidden(), around).expert_TK, build("topk").eval()(hidden()).expert_TK)

    def test_a_pool_outside_training_follows_the_text(self) -> None:
        router = build("document_pool", **pools(eval=3)).eval()
        routing = router(hidden(), Surroundings(documents=documents_of(TEXT, DOCUMENTS)))
        probability = softmax(logits(router)).reshape(2, 7, EXPERTS)
        for b, row in enumerate(NUMBERS):
            for s, number in enumerate(row):
                total = sum(probability[b, i] for i in range(s + 1) if row[i] == number)
                best = sorted(np.argsort(-total)[:3], key=lambda e: -probability[b, s, e])[:2]
                assert routing.expert_TK.view(2, 7, 2)[b, s].tolist() == [int(e) for e in best]

    def test_a_model_takes_documents_for_its_router(self) -> None:
        text, document_BS = tokens(), torch.tensor([[0] * 4 + [1] * 4] * 2)
        keys = {"moe_router_type": "document_pool", "moe_num_experts": 6, "moe_top_k": 2, **pools(min=2, max=2)}
        model = tiny_model(model_section(), moe_section(**keys))
        apart = model(text[:, :-1], labels_BS=text[:, 1:], document_BS=document_BS)
        together = model(text[:, :-1], labels_BS=text[:, 1:])
        assert not torch.equal(apart.report.expert_load_XE, together.report.expert_load_XE)
        assert (together.report.expert_load_XE > 0).sum(1).max() <= 4, "two documents, each with two experts"
        with pytest.raises(InputError, match="this model does not separate them"):
            tiny_model(model_section(), moe_section())(text, document_BS=torch.zeros_like(text))


class TestRecurrent:
    def test_it_is_torch_s_gru_on_a_projection(self) -> None:
        router = build("recurrent", moe_router_rnn_hidden_size=10, moe_normalize_top_k=True)
        cell = torch.nn.GRUCell(10, 10)
        with torch.no_grad():
            for bias in (router.cell.input_bias, router.cell.memory_bias):
                bias.normal_(generator=torch.Generator().manual_seed(1))
            for theirs, ours in zip(cell.parameters(), list(router.cell.parameters())[:4], strict=True):
                theirs.copy_(ours)
        memory_TP = torch.randn(TOKENS, 10, generator=torch.Generator().manual_seed(2))
        for given in (memory_TP, None):
            before_TP = router.cell.start.expand(TOKENS, 10) if given is None else given
            after_TP = cell(hidden() @ router.into.weight.T, before_TP)
            routing = router(hidden(), Surroundings(memory_TP=given))
            torch.testing.assert_close(routing.memory_TP, after_TP)
            torch.testing.assert_close(routing.logit_TE, after_TP @ router.layer.weight.T)
            weight_TK, expert_TK = (after_TP @ router.layer.weight.T).softmax(-1).topk(2)
            assert torch.equal(routing.expert_TK, expert_TK)
            torch.testing.assert_close(routing.weight_TK, weight_TK / weight_TK.sum(-1, keepdim=True))

    def test_all_layers_have_one_gru_and_the_memory_goes_through_them(self) -> None:
        moe = moe_section(moe_router_type="recurrent", moe_router_rnn_hidden_size=6, moe_layers=[1, 3, 4], moe_losses={})
        model = tiny_model(model_section(num_layers=5), moe)
        cells = [name for name in model.state_dict() if ".cell." in name]
        assert len(cells) == 5
        assert all(name.startswith("sequential.3.mlp.router.cell.") for name in cells), "the first layer with experts keeps it"
        text = tokens()
        seen: list[Tensor] = []
        for layer in model.layers:
            if hasattr(layer.mlp, "router"):
                layer.mlp.router.register_forward_hook(lambda module, inputs, routing: seen.append((inputs[1].memory_TP, routing.memory_TP)))
        model(text[:, :-1], labels_BS=text[:, 1:]).loss.backward()
        assert seen[0][0] is None
        assert seen[1][0] is seen[0][1]
        assert seen[2][0] is seen[1][1]
        for name, parameter in model.named_parameters():
            if "router" in name:
                assert parameter.grad is not None, name
                assert parameter.grad.any(), name


CACHED: dict[str, dict[str, Any]] = {
    "recurrent": {"moe_router_type": "recurrent", "moe_router_rnn_hidden_size": 6},
    "pool": {"moe_router_type": "document_pool", "moe_num_experts": 6, "moe_top_k": 2, **pools(eval=3)},
    "thresholds": {"moe_router_type": "expert_threshold"},
}


@pytest.mark.parametrize("steps", [[1] * 9, [4, 1, 1, 3]], ids=str)
@pytest.mark.parametrize("name", CACHED)
def test_decoding_with_a_cache_equals_the_full_forward(name: str, steps: list[int]) -> None:
    section = model_section()
    model, text = tiny_model(section, moe_section(**CACHED[name])).eval(), tokens()
    cache = build_cache(section, 2, 10)
    with torch.inference_mode():
        parts = [model(part, cache=cache).logits_BSV for part in text.split(steps, dim=1)]
        torch.testing.assert_close(torch.cat(parts, 1), model(text).logits_BSV, rtol=1e-4, atol=1e-5)
        for entry in cache:
            entry.length = 5  # what was generated after it is taken back
        torch.testing.assert_close(model(text[:, 5:], cache=cache).logits_BSV, model(text).logits_BSV[:, 5:], rtol=1e-4, atol=1e-5)
