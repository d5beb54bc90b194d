"""What the processes of these tests do; functions at the top of a module, so that they can be sent there."""

from __future__ import annotations

import resource
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from megatron.checkpoint import ranks
from megatron.checkpoint.engine import Contents
from megatron.checkpoint.held import WEIGHT, Share, held_optimizer, held_weights, optimizer_slots
from megatron.checkpoint.load import Expected, find_checkpoint_together, load_checkpoint
from megatron.checkpoint.save import resolved_config_document, save_checkpoint
from megatron.checkpoint.sums import check_sums
from megatron.checkpoint.weights import load_model_weights
from megatron.model.gpt import GPT, build_model
from megatron.mpu.topology import Topology
from megatron.testing.tiny import TINY_DENSE, tiny_config
from megatron.training.optimizer import parameter_groups
from tests.checkpoint.toy import build_engine, content, quick_deepspeed, seed_ranks, train

CLIENT_STATE = {"args": {"hidden_size": 7, "num_attention_heads": 1}, "structmoe": {"consumed_samples": 12, "skipped": 0}}
DOCUMENTS = {"a.yml": "x: 1\n", "b.yml": "x: 2\n", **resolved_config_document({"hidden_size": 7})}


def several(work: dict[str, tuple[Any, ...]]) -> dict[str, Any]:
    """Runs functions of this module, by name, one after the other in the same processes."""
    return {name: globals()[name](*arguments) for name, arguments in work.items()}


def save(engine: Any, directory: Path, iteration: int, **options: Any) -> Path:
    return save_checkpoint(engine, directory, iteration, client_state=CLIENT_STATE, documents=DOCUMENTS, **options)


def run_directory(root: str, dtype: str, stage: int) -> Path:
    # Brackets: DeepSpeed looks for its files with glob.
    return Path(root) / f"{dtype} zero[{stage}] world {ranks.world_size()}"


def save_and_resume(root: str, cases: list[tuple[str, int]]) -> dict[tuple[str, int], dict[str, Any]]:
    """For each (dtype, stage): train 3 steps, save, train 3 more; then the same 3 from the checkpoint, in an engine that started differently."""
    results = {}
    for dtype, stage in cases:
        directory = run_directory(root, dtype, stage)
        engine = build_engine(stage, dtype)
        seed_ranks(5)
        train(engine, 3)
        path = save(engine, directory, 3)
        straight = train(engine, 3)
        resumed_engine = build_engine(stage, dtype, seed=9)
        seed_ranks(77)
        client_state = load_checkpoint(resumed_engine, find_checkpoint_together(directory))
        resumed = train(resumed_engine, 3)
        again = save(resumed_engine, directory, 6)
        results[dtype, stage] = {
            "straight": straight,
            "resumed": resumed,
            "saved": str(path),
            "saved_again": str(again),
            "client_state": {key: client_state[key] for key in (*CLIENT_STATE, "iteration")},
            "global_steps": resumed_engine.global_steps,
        }
    return results


def full_weights(engine: Any) -> dict[str, torch.Tensor]:
    """Every parameter and buffer, whole, also under ZeRO 3."""
    import deepspeed

    with deepspeed.zero.GatheredParameters([p for p in engine.module.parameters() if hasattr(p, "ds_id")]):
        return {name: tensor.detach().clone() for name, tensor in engine.module.state_dict().items()}


def load_weights_only(paths: list[str], stages: list[int], dtype: str) -> dict[tuple[str, int], dict[str, Any]]:
    """Weights of each checkpoint into an engine of each stage, then two steps; hashes before and losses after."""
    results = {}
    for stage in stages:
        for path in paths:
            engine = build_engine(stage, dtype, seed=9)
            load_checkpoint(engine, path, load_optimizer=False, load_rng=False)
            seed_ranks(5)
            loaded = full_weights(engine)
            results[path, stage] = {"content": content(loaded), "losses": train(engine, 2), "global_steps": engine.global_steps}
    return results


def refused(load: Callable[[], Any]) -> str:
    try:
        load()
    except ValueError as error:
        return str(error)
    return "loaded"


def refusals(fitting: str) -> dict[str, Any]:
    """The sentence for each checkpoint that does not fit, and whether the engine stayed as it was."""
    engine = build_engine(1)
    before = content(full_weights(engine))
    narrow, deep = build_engine(1, width=5), build_engine(1, depth=3)
    sentences = {
        "width": refused(lambda: load_checkpoint(narrow, fitting)),
        "depth": refused(lambda: load_checkpoint(deep, fitting)),
        "args": refused(lambda: load_checkpoint(engine, fitting, expected=Expected({"num_attention_heads": 2, "hidden_size": 7, "unknown": 1}))),
    }
    return {"sentences": sentences, "untouched": content(full_weights(engine)) == before}


def load_at_another_size(path: str) -> dict[str, Any]:
    """A ZeRO-0 checkpoint of one process: what is loaded, and the next random number."""
    engine = build_engine(0)
    load_checkpoint(engine, path)
    return {"random": torch.rand(1).item(), "content": content(full_weights(engine))}


def resume_in_other_stage(root: str) -> dict[int, list[float]]:
    """By the stage that saved: the losses of the stage that resumes, 1 for 2 and 2 for 1."""
    losses = {}
    for source, target in ((1, 2), (2, 1)):
        engine = build_engine(target, seed=9)
        load_checkpoint(engine, run_directory(root, "fp32", source) / "global_step3")
        losses[source] = train(engine, 3)
    return losses


def build_gpt_engine(seed: int) -> Any:
    """An engine around a tiny dense GPT, whose names say in which order GPT-NeoX's optimizer has its weights."""
    deepspeed = quick_deepspeed()
    deepspeed.init_distributed(dist_backend="gloo")
    config = tiny_config(TINY_DENSE)
    model = build_model(config.model, config.moe, 64, seed=seed)
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.1), lr=0.01, fused=True)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config={"train_micro_batch_size_per_gpu": 2})
    return engine


def train_gpt(engine: Any, steps: int) -> list[float]:
    """Steps on random tokens."""
    losses = []
    for _ in range(steps):
        tokens_BS = torch.randint(64, (2, 16))
        loss = engine(tokens_BS, labels_BS=tokens_BS).loss
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return losses


def save_gpt(root: str) -> str:
    """A checkpoint of a tiny GPT at ZeRO 0."""
    engine = build_gpt_engine(1)
    seed_ranks(5)
    train_gpt(engine, 3)
    return str(save(engine, Path(root), 3))


def load_foreign(path: str) -> dict[str, Any]:
    """A ZeRO-0 checkpoint of one process without anything of ours in it: random numbers that follow, and what was loaded."""
    stored = torch.load(Path(path) / "mp_rank_00_model_states.pt", weights_only=True)
    foreign = Path(path).parent / f"foreign of {ranks.rank()}" / "global_step3"
    foreign.mkdir(parents=True)
    torch.save({key: value for key, value in stored.items() if key != "gqa_layout"}, foreign / "mp_rank_00_model_states.pt")
    engine = build_gpt_engine(9)
    seed_ranks(77)
    load_checkpoint(engine, foreign)
    check_sums(Path(path), engine, Share(Topology(ranks.world_size(), ranks.rank())), optimizer=True)
    return {"random": torch.rand(1).item(), "steps": engine.global_steps}


def changed_on_the_last_rank(paths: Mapping[str, str]) -> dict[str, str]:
    """By kind of tensor: the sentence when one number differs on the last rank only, after a checkpoint was loaded."""
    share = Share(Topology(ranks.world_size(), ranks.rank()))
    sentences = {}
    for kind, path in paths.items():
        engine = build_engine(0 if "zero[0]" in path else 1)
        load_checkpoint(engine, path)
        if ranks.rank() == ranks.world_size() - 1:
            found = {WEIGHT: held_weights(engine, share)} if kind == WEIGHT else {}
            held = found.get(kind) or (entry for name, entry in held_optimizer(engine, optimizer_slots(engine, share)) if name == kind)
            next(entry for entry in held if entry.name == "layers.1.weight").values[-1] += 1
        sentences[kind] = refused(lambda engine=engine, path=path: check_sums(Path(path), engine, share, optimizer=True))
    return sentences


def pipeline_module(root: str) -> dict[str, bool]:
    """Layer files between us and DeepSpeed's PipelineModule, which GPT-NeoX lets write and read them: whether the weights arrive, both ways."""
    deepspeed = quick_deepspeed()
    from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine
    from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology

    deepspeed.init_distributed(dist_backend="gloo")
    config = tiny_config(TINY_DENSE)

    def model(seed: int) -> GPT:
        return build_model(config.model, config.moe, 64, seed=seed)

    def pipeline(gpt: GPT) -> Any:
        layers = [dict(gpt.sequential.items()).get(str(index), lambda x: x) for index in range(7)]
        module = deepspeed.pipe.PipelineModule(layers=layers, topology=PipeModelDataParallelTopology(num_pp=1, num_mp=1, num_dp=1))
        module.checkpoint_parallel_write_pipeline = False  # as its engine sets it
        return module

    def same(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> bool:
        return set(one) == set(other) and all(torch.equal(one[name], other[name]) for name in other)

    theirs, ours, read = model(1), model(2), model(3)
    path = Path(root) / "theirs" / "global_step1"
    pipeline(theirs).save_state_dict(str(path), TorchCheckpointEngine())
    torch.save({"module": None, "iteration": 1}, path / "mp_rank_00_model_states.pt")
    arrived = load_model_weights(path).state_dict
    optimizer = torch.optim.AdamW(ours.parameters(), fused=True)
    engine, *_ = deepspeed.initialize(model=ours, optimizer=optimizer, config={"train_micro_batch_size_per_gpu": 1})
    saved = save(engine, Path(root) / "ours", 1, contents=Contents(layer_files=True))
    pipeline(read).load_state_dir(str(saved), TorchCheckpointEngine())
    names = [sorted(file.name for file in folder.glob("layer_*")) for folder in (path, saved)]
    return {"read": same(arrived, theirs.state_dict()), "written": same(read.state_dict(), ours.state_dict()), "names": names[0] == names[1]}


def fill_up(root: str) -> dict[str, Any]:
    """A save that fails on the last rank only, because its files may not grow; then one that works again."""
    directory = Path(root)
    engine = build_engine(1)
    save(engine, directory, 1)
    last = ranks.rank() == ranks.world_size() - 1
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    if last:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))
    sentence = refused(lambda: save(engine, directory, 2))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    found, left = str(find_checkpoint_together(directory)), sorted(entry.name for entry in directory.iterdir())
    ranks.gather(None)
    save(engine, directory, 2)
    return {"sentence": sentence, "found": found, "left": left, "after": str(find_checkpoint_together(directory))}


def fill_disk(disk: str, filler_bytes: int) -> dict[str, Any]:
    """A save onto a disk that has no room for it; then room is made and it works."""
    directory = Path(disk) / "run"
    engine = build_engine(0)
    save(engine, directory, 1)
    filler = Path(disk) / "filler"
    filler.write_bytes(b"x" * filler_bytes)
    sentence = refused(lambda: save(engine, directory, 2))
    found, left = find_checkpoint_together(directory).name, sorted(entry.name for entry in directory.iterdir())
    filler.unlink()
    return {"sentence": sentence, "found": found, "left": left, "after": save(engine, directory, 2).name}


def unwritable(directory: str) -> str:
    return refused(lambda: save(build_engine(0), Path(directory), 1))


def replace_same_step(root: str) -> list[str]:
    """Saves the same step three times and returns the weights' hash at each save and what is stored at the end."""
    engine = build_engine(0)
    seed_ranks(1)
    hashes = []
    for _ in range(3):
        train(engine, 1)
        save(engine, Path(root), 7)
        hashes.append(content(engine.module.state_dict()))
    return [*hashes, content(load_model_weights(root).state_dict), ",".join(sorted(entry.name for entry in Path(root).iterdir()))]


def bad_client_states(root: str) -> list[str]:
    engine = build_engine(0)
    bad: list[dict[str, Any]] = [{"optimizer": 1}, {"structmoe": {"path": Path("x")}}, {"list": [1, (2, {3})]}]
    return [refused(lambda state=state: save_checkpoint(engine, root, 1, client_state=state, documents={})) for state in bad]


def save_without_rng(root: str) -> str:
    engine = build_engine(0)
    save(engine, Path(root), 1, contents=Contents(random_state=False))
    return refused(lambda: load_checkpoint(engine, Path(root) / "global_step1"))
