"""Names of tasks and their data."""

from __future__ import annotations

import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron.config.evaluation import EvaluationConfig
from megatron.inference.errors import InferenceError
from megatron.inference.harness.answers import question
from megatron.inference.harness.run import is_of_a_task, place_of
from megatron.inference.harness.tasks import GROUPS, every_task, find_tasks, harness_seeds, load_tasks, task_names


def test_names_of_ours_and_patterns() -> None:
    known = ["arc_challenge", "arc_easy", "piqa", *GROUPS["cosmoes"]]
    assert task_names(["cosmoes"], known) == list(GROUPS["cosmoes"])
    assert len(GROUPS["cosmoes"]) == 10
    assert task_names(["arc_e*", "piqa", "arc_easy"], known) == ["arc_easy", "piqa"]
    with pytest.raises(InferenceError, match=r"eval_tasks: lm-evaluation-harness has no task 'pica'; did you mean .*piqa.*lm_eval ls tasks"):
        task_names(["pica"], known)


def test_plain_names_need_not_read_every_task() -> None:
    names, manager = find_tasks(["cosmoes", "wikitext"])
    assert names == [*GROUPS["cosmoes"], "wikitext"]
    assert len(manager.all_tasks) < 1000
    assert {"mmlu_stem", "mmlu_abstract_algebra", "agieval_sat_en"} <= set(manager.all_tasks)


@pytest.mark.slow
def test_the_harness_knows_what_the_short_way_finds() -> None:
    every = every_task()
    names, manager = find_tasks(["cosmoes"])
    assert all(name in every.all_tasks for name in names)
    assert all(manager.task_index[name].yaml_path == every.task_index[name].yaml_path for name in names)


def test_local_data_are_taken_and_nothing_stays_changed(task_data: Path) -> None:
    import datasets

    before = os.getcwd(), datasets.config.HF_HUB_OFFLINE, random.getstate(), torch.get_rng_state(), np.random.get_state()[1].tolist()
    loaded = load_tasks(EvaluationConfig(eval_tasks=["arc_easy", "lambada_openai"], eval_data=str(task_data), eval_num_fewshot=1))
    assert list(loaded["tasks"]) == ["arc_easy", "lambada_openai"]
    assert len(loaded["tasks"]["arc_easy"].dataset["test"]) == 12
    assert loaded["tasks"]["arc_easy"].config.num_fewshot == 1
    after = os.getcwd(), datasets.config.HF_HUB_OFFLINE, random.getstate(), torch.get_rng_state(), np.random.get_state()[1].tolist()
    assert after[:3] == before[:3]
    assert after[4] == before[4]
    assert torch.equal(after[3], before[3])


def test_data_that_are_not_there_are_named_all_at_once(task_data: Path) -> None:
    chosen = EvaluationConfig(eval_tasks=["piqa", "arc_easy", "hellaswag"], eval_data=str(task_data))
    with pytest.raises(
        InferenceError, match=r"the data of 2 task\(s\) cannot be loaded in .*piqa: .*baber/piqa.*hellaswag: .*leave these .*\[arc_easy\]"
    ):
        load_tasks(chosen)
    with pytest.raises(InferenceError, match="eval_data: there is no folder nowhere"):
        load_tasks(EvaluationConfig(eval_tasks=["piqa"], eval_data="nowhere"))


def test_code_of_a_model_is_not_run() -> None:
    with pytest.raises(InferenceError, match="humaneval"):
        load_tasks(EvaluationConfig(eval_tasks=["humaneval"], eval_data="."))


def test_random_numbers_go_on_as_before() -> None:
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    first = torch.rand(1)
    with harness_seeds():
        torch.rand(5)
    assert torch.equal(torch.cat([first, torch.rand(1)]), expected)


def test_a_mistake_of_a_task_is_told_from_a_bug_of_ours() -> None:
    def document_to_text(document: dict[str, str]) -> str:
        return document["question"]

    with pytest.raises(KeyError) as of_a_task:
        document_to_text({})
    assert is_of_a_task(of_a_task.value)
    assert place_of(of_a_task.value).startswith(f"{__file__}, line ")
    nothing: Any = None
    with pytest.raises(TypeError) as ours:
        question(nothing, [], nothing)
    assert not is_of_a_task(ours.value)
