"""16-bit weights at every ZeRO stage: no step before the first, one curve, sums in fp32, and memory as it is printed."""

from __future__ import annotations

import gc
import itertools
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron.analysis.size import memory_per_process
from megatron.checkpoint.errors import CheckpointError
from megatron.config.neox import rounding_notice
from megatron.kernels.adam import OP
from megatron.model.gpt import build_model
from megatron.testing.distributed import run_distributed
from megatron.testing.tiny import TINY_DENSE, tiny_config
from megatron.training.callbacks.base import Callback
from megatron.training.engine import build_engine
from megatron.training.master_weights import MASTERS, OPTIMIZER, MasterWeights
from megatron.training.process import start_process
from megatron.training.setup import build_trainer
from megatron.training.step import take_step
from tests.training.runs import losses_of, run_values, train_losses, train_with_bad_losses

ADAM = {"type": "Adam", "params": {"lr": 2e-3}}
KINDS = {"Adam": {"lr": 1e-2}, "SGD": {"lr": 0.1, "momentum": 0.9}, "Lion": {"lr": 1e-3}}


def values_of(corpus: Path, metrics: Path | None, **overrides: Any) -> dict[str, Any]:
    """A dense model in bfloat16."""
    values = {key: value for key, value in run_values(corpus, None).items() if key in TINY_DENSE or not key.startswith(("moe_", "intermediate"))}
    rest = {"optimizer": ADAM, "precision": "bfloat16", "eval_iters": 0, "metrics_file": None if metrics is None else str(metrics)}
    return {**values, **rest, **overrides}


def engine_of(**overrides: Any) -> Any:
    config = tiny_config({**TINY_DENSE, "precision": "bfloat16", **overrides})
    start_process(backend="gloo", threads=None)
    return build_engine(config, build_model(config.model, config.moe, 128, seed=1), world_size=1)


def batches() -> Iterator[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    while True:
        yield {"text": torch.randint(128, (2, 17), generator=generator)}


def step_of(engine: Any, data: Iterator[dict[str, torch.Tensor]], rate: float = 1e-3) -> Any:
    return take_step(engine, data, learning_rate=rate, masked_token=None, before_update=lambda: None)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_no_step_is_taken_while_the_engine_is_built(kind: str, stage: int) -> None:
    """Weights are not decayed, no average is kept and no step is counted before the first; after it, one."""
    optimizer = {"type": kind, "params": KINDS[kind]}
    engine = engine_of(optimizer=optimizer, weight_decay=0.5, zero_optimization={"stage": stage})
    inner = engine.optimizer.optimizer
    assert not any(state for state in inner.state.values())
    if stage == 0:
        torch.testing.assert_close(torch.cat([m.flatten() for m in engine.optimizer.masters]), drawn(engine), rtol=0, atol=0)
    assert step_of(engine, batches(), 1e-3).applied
    if kind == "Adam":
        assert {float(state["step"]) for state in inner.state.values()} == {1.0}


def drawn(engine: Any) -> torch.Tensor:
    """The weights of `engine_of`'s model as they are drawn, in bfloat16's values and the order of the optimizer."""
    config = tiny_config(TINY_DENSE)
    fresh = dict(build_model(config.model, config.moe, 128, seed=1).named_parameters())
    names = {id(weight): name for name, weight in engine.module.named_parameters()}
    return torch.cat([fresh[names[id(weight)]].detach().bfloat16().float().flatten() for weight in engine.optimizer.weights])


def test_all_stages_follow_one_curve(corpus: Path, tmp_path: Path) -> None:
    """20 steps from a high first rate with weight decay, which one step more at the start moves by 1e-2."""
    settings = {"train_iters": 20, "train_micro_batch_size_per_gpu": 4, "warmup": 0.0, "weight_decay": 0.5}
    curves = {
        f"{precision} {stage}": train_losses(
            values_of(corpus, tmp_path / f"{precision}{stage}", precision=precision, zero_optimization={"stage": stage}, **settings)
        )
        for precision, stage in (("fp32", 0), ("bfloat16", 0), ("bfloat16", 1), ("bfloat16", 3))
    }
    assert curves["bfloat16 0"] == pytest.approx(curves["bfloat16 1"], abs=1e-3)
    assert curves["bfloat16 3"] == pytest.approx(curves["bfloat16 1"], abs=1e-3)
    assert curves["bfloat16 0"] == pytest.approx(curves["fp32 0"], abs=5e-3)


def train_several(settings: list[dict[str, Any]]) -> list[list[float]]:
    """`train_losses` of each, one after the other: processes are slow to start."""
    return [train_losses(values) for values in settings]


def test_two_processes_average_the_sums(corpus: Path, tmp_path: Path) -> None:
    """At stage 0 the fp32 sums are what is averaged: the losses of stage 1, and of one process, whose micro-batches these are."""
    settings = {"train_iters": 8, "train_batch_size": 8, "weight_decay": 0.5, "warmup": 0.0}
    cuts = [{"zero_optimization": {"stage": stage}, "metrics_file": str(tmp_path / f"two{stage}.jsonl")} for stage in (0, 1)]
    zero, one = run_distributed(train_several, 2, [values_of(corpus, None, **settings, **cut) for cut in cuts], backend=None)[0]
    alone = train_losses(values_of(corpus, tmp_path / "alone.jsonl", **settings))
    assert zero == pytest.approx(one, abs=1e-3)
    assert zero == pytest.approx(alone, abs=1e-3)


def test_micro_batches_are_summed_in_fp32() -> None:
    """One large gradient and then 255 of 1/256 of it: added up in bfloat16 each of them is lost."""
    for sum_in_fp32, expected in ((True, 1 + 255 / 256), (False, 1.0)):
        weight = torch.nn.Parameter(torch.zeros(4, dtype=torch.bfloat16))
        optimizer = master_weights(weight, sum_in_fp32=sum_in_fp32)
        for share in [1.0, *[1 / 256] * 255]:
            (weight.float().sum() * share).backward()
        assert float(optimizer.gradient(weight)[0]) == expected


def master_weights(weight: torch.nn.Parameter, *, sum_in_fp32: bool = True, scale: float = 1.0, dynamic: bool = False) -> MasterWeights:
    from deepspeed.runtime.fp16.loss_scaler import CreateLossScaler

    from megatron.training.skipping import SkippingSGD

    inner = SkippingSGD([{"params": [weight]}], max_norm=0.0, lr=0.5, fused=True)
    arguments = {"init_scale": 2.0**4, "scale_window": 2, "min_scale": 1, "delayed_shift": 1, "consecutive_hysteresis": False}
    scaler = CreateLossScaler(
        torch.half if weight.dtype == torch.half else weight.dtype, scale, dynamic, {**arguments, "raise_error_at_min_scale": False}
    )
    return MasterWeights(inner, scaler=scaler, sum_in_fp32=sum_in_fp32)


def test_fp16_scales_the_loss_and_divides_the_gradients_by_it() -> None:
    """A gradient below fp16's range arrives whole; an overflow changes nothing and lowers the scale; the norm is without the scale."""
    start_process(backend="gloo", threads=None)
    weight = torch.nn.Parameter(torch.zeros(2, dtype=torch.float16))
    optimizer = master_weights(weight, dynamic=True)
    small = 2.0**-26
    optimizer.scale_loss((weight * 1.0).float().sum() * small).backward()
    optimizer.step()
    optimizer.zero_grad()
    assert optimizer._global_grad_norm == pytest.approx(small * 2**0.5)
    assert optimizer.masters[0].tolist() == [-0.5 * small] * 2
    optimizer.scale_loss((weight.float() * 1e30).sum() * 1e30).backward()
    optimizer.step()
    assert optimizer.overflow
    assert optimizer.masters[0].tolist() == [-0.5 * small] * 2
    assert optimizer.cur_scale == 2.0**3


def test_a_resumed_bfloat16_run_is_bit_for_bit_the_same(corpus: Path, tmp_path: Path) -> None:
    values = values_of(corpus, None, gradient_accumulation_steps=3, checkpoint_factor=4, hidden_dropout=0.1)
    expected = train_losses({**values, "save": str(tmp_path / "a")})
    halves = {**values, "save": str(tmp_path / "b"), "resume_if_exists": True}
    train_losses({**halves, "exit_interval": 5})
    assert train_losses(halves) == expected


def test_a_step_that_is_not_finite_is_skipped_where_gradients_are_summed_in_fp32(corpus: Path, tmp_path: Path) -> None:
    for stage in (0, 1, 2):
        values = values_of(corpus, tmp_path / f"{stage}.jsonl", gradient_accumulation_steps=2, train_iters=5, zero_optimization={"stage": stage})
        losses = train_with_bad_losses({**values, "data_types": {"grad_accum_dtype": "fp32"}}, {4: float("nan")})
        assert losses[2] is None, stage
        assert all(loss < 7 for loss in losses[:2] + losses[3:]), stage


def test_the_optimizer_s_state_of_deepspeed_s_own_wrapper_is_read() -> None:
    """What versions before this one saved, and DeepSpeed without us saves."""
    import deepspeed

    config = tiny_config({**TINY_DENSE, "precision": "bfloat16", "optimizer": ADAM})
    start_process(backend="gloo", threads=None)
    from megatron.config.deepspeed_json import deepspeed_config
    from megatron.training.optimizer import build_optimizer

    model = build_model(config.model, config.moe, 128, seed=1)
    theirs, *_ = deepspeed.initialize(model=model, optimizer=build_optimizer(config.optimizer, model, "cpu"), config=deepspeed_config(config, 1))
    stored = theirs.optimizer.state_dict()
    assert type(theirs.optimizer).__name__ == "FP16_UnfusedOptimizer"
    ours = engine_of(optimizer=ADAM)
    ours.optimizer.load_state_dict(stored)
    for mine, there in zip(ours.optimizer.masters, itertools.chain(*stored[MASTERS]), strict=True):
        assert torch.equal(mine, there)
    assert {float(state["step"]) for state in ours.optimizer.state.values()} == {1.0}, "the step that was taken there is counted here"
    with pytest.raises(CheckpointError, match="is not that of 16-bit weights at zero_optimization stage 0"):
        ours.optimizer.load_state_dict({**stored, MASTERS: stored[MASTERS][:1]})
    with pytest.raises(CheckpointError, match="it has optimizer_state_dict"):
        ours.optimizer.load_state_dict({OPTIMIZER: {}})


class Memory(Callback):
    """Bytes of all floating-point numbers in this process when gradients are complete, of the last step."""

    found = 0

    def before_update(self, trainer: Any) -> None:
        self.found = live_bytes()


def live_bytes() -> int:
    gc.collect()
    tensors = [value for value in gc.get_objects() if isinstance(value, torch.Tensor) and value.is_floating_point()]
    tensors += [tensor.grad for tensor in tensors if tensor.is_leaf and tensor.grad is not None]
    return sum({storage.data_ptr(): storage.nbytes() for storage in (tensor.untyped_storage() for tensor in tensors)}.values())


MEMORY: list[tuple[str, int, Mapping[str, Any]]] = [
    ("fp32", 0, {}),
    ("fp32", 1, {}),
    ("bfloat16", 0, {}),
    ("bfloat16", 1, {}),
    ("bfloat16", 2, {}),
    ("bfloat16", 3, {}),
    ("bfloat16", 1, {"data_types": {"grad_accum_dtype": "fp32"}}),
    ("bfloat16", 2, {"data_types": {"grad_accum_dtype": "fp32"}}),
    ("bfloat16", 0, {"optimizer": {"type": "Lion", "params": {"lr": 1e-3}}}),
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("precision", "stage", "keys"), MEMORY)
def test_memory_is_as_it_is_printed(corpus: Path, precision: str, stage: int, keys: Mapping[str, Any]) -> None:
    """At the second update, where there is everything. ZeRO 3's bucket is small here, for it is not counted."""
    zero = {"stage": stage, "reduce_bucket_size": 1000, "stage3_param_persistence_threshold": 0}
    settings = {"precision": precision, "zero_optimization": zero, "hidden_size": 128, "gradient_accumulation_steps": 2, **keys}
    config = tiny_config(values_of(corpus, None, **settings))
    before = live_bytes()
    trainer = build_trainer(config, start_process(backend="gloo", threads=None))
    parameters = sum(getattr(weight, "ds_numel", weight.numel()) for weight in trainer.engine.module.parameters())
    memory, data = Memory(), trainer.training_batches()
    for _ in range(2):
        take_step(trainer.engine, data, learning_rate=1e-3, masked_token=None, before_update=lambda: memory.before_update(trainer))
    printed = memory_per_process(config, parameters, 1).total
    assert memory.found - before == pytest.approx(printed, rel=0.01)


@pytest.mark.skipif(OP.status("cpu")["compiled"] is not None, reason=f"compiled Adam: {OP.status('cpu')['compiled']}")
def test_the_gradient_of_a_single_micro_batch_stays_in_16_bits() -> None:
    """PyTorch's Adam keeps a sum in fp32 for each. The weights after a step are its weights."""
    weights, found = {}, {}
    for name in ("torch", "auto"):
        engine = engine_of(optimizer={**ADAM, "implementation": name}, hidden_size=128)
        parameters = sum(weight.numel() for weight in engine.module.parameters())
        data = batches()
        for _ in range(3):
            before = live_bytes()
            take_step(engine, data, learning_rate=1e-2, masked_token=None, before_update=lambda name=name: found.update({name: live_bytes()}))
            found[name] -= before
            masters = torch.cat([master.detach().flatten() for master in engine.optimizer.masters])
            weights.setdefault(name, masters)  # of the first step: rounding to 16 bits pulls later ones apart
            assert torch.equal(masters.bfloat16(), torch.cat([weight.detach().flatten() for weight in engine.optimizer.weights]))
        assert all(weight.grad is None for weight in engine.module.parameters())
    torch.testing.assert_close(weights["auto"], weights["torch"], rtol=1e-5, atol=1e-6)
    assert found["torch"] < 0.1 * parameters, "the sums in fp32 are kept"
    assert found["auto"] == pytest.approx(2 * parameters, rel=0.05)


def test_a_notice_names_the_key_where_16_bits_are_summed(corpus: Path, tmp_path: Path, capsys: Any) -> None:
    keys = {"gradient_accumulation_steps": 4, "zero_optimization": {"stage": 1}}
    config = tiny_config(values_of(corpus, None, **keys))
    sentence = (
        "the gradients of 4 micro-batches are summed in bf16; this loses small gradients beside large ones; "
        "data_types: {grad_accum_dtype: fp32} sums them in fp32"
    )
    assert rounding_notice(config, 1) == sentence
    for without in (
        {"zero_optimization": {"stage": 0}},
        {"gradient_accumulation_steps": 1},
        {"precision": "fp32"},
        {"data_types": {"grad_accum_dtype": "fp32"}},
    ):
        assert rounding_notice(tiny_config(values_of(corpus, None, **{**keys, **without})), 1) is None
    train_losses(values_of(corpus, tmp_path / "m.jsonl", train_iters=1, **keys))
    assert f"T{sentence[1:]}." in capsys.readouterr().out


def test_gradients_are_measured_in_the_sums(corpus: Path, tmp_path: Path) -> None:
    """Norms of single gradients together are the norm of the step."""
    values = values_of(corpus, tmp_path / "m.jsonl", log_grad_norm=True, train_iters=1, gradient_accumulation_steps=2)
    train_losses(values)
    records = [json.loads(line) for line in (tmp_path / "m.jsonl").read_text().splitlines()]
    norms = [value for record in records for key, value in record.items() if key.startswith("gradient_norms/")]
    assert len(norms) > 10
    assert sum(norm**2 for norm in norms) ** 0.5 == pytest.approx(losses_of(tmp_path / "m.jsonl", "train/grad_norm")[0], rel=1e-4)


def test_fp16_takes_the_steps_of_zero_1(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU, which DeepSpeed has to be told to allow; slow there, but the same arithmetic."""
    from deepspeed.accelerator import get_accelerator

    monkeypatch.setattr(get_accelerator(), "is_fp16_supported", lambda: True)
    found = []
    for stage in (0, 1):
        scale = {"fp16": {"initial_scale_power": 12}, "zero_optimization": {"stage": stage}}
        engine, data = engine_of(precision="fp16", gradient_accumulation_steps=2, **scale), batches()
        metrics = [step_of(engine, data) for _ in range(3)]
        assert all(step.applied and step.loss_scale == 2**12 for step in metrics)
        found.append([(step.lm_loss, step.grad_norm) for step in metrics])
    assert [pytest.approx(step, rel=1e-3) for step in found[1]] == found[0]
