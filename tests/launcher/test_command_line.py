"""deepy.py and the worker scripts as people call them, in processes of their own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from megatron.config.aliases import TABLE, Refused
from megatron.launcher.command_line import KEY_FLAGS, read_deepy_arguments
from tests.scripts import run_script

CONFIG = """num_layers: 2
hidden_size: 64
num_attention_heads: 4
seq_length: 32
max_position_embeddings: 32
pos_emb: rotary
moe_num_experts: 4
moe_top_k: 2
train_iters: 100
train_micro_batch_size_per_gpu: 4
optimizer: {type: Adam, params: {lr: 1e-3}}
data_path: data/x
rope_fusion: true
"""
# A worker: what it was given, and whether anything heavy was imported on the way.
SCRIPT = """import os, sys
from megatron.launcher import config_from_argv
loaded = config_from_argv(sys.argv[1:])
print(loaded.config.model.num_layers, loaded.config.training.seed, sorted(loaded.files), loaded.overrides, loaded.config.checkpoint.iteration)
print(sorted({"torch", "deepspeed", "numpy"} & set(sys.modules)), os.environ.get("DS_ACCELERATOR"))
raise SystemExit(loaded.config.training.exit_interval or 0)
"""


@pytest.fixture
def folder(tmp_path: Path, repository: Path) -> Path:
    """A directory with a space in its name that holds deepy.py's configuration and scripts."""
    place = tmp_path / "a folder"
    (place / "configs").mkdir(parents=True)
    (place / "configs" / "small.yml").write_text(CONFIG)
    (place / "worker.py").write_text(SCRIPT)
    (place / "train.py").write_text(SCRIPT)
    (place / "generate.py").write_text(SCRIPT)
    shutil.copy(repository / "deepy.py", place)
    return place


def environment() -> dict[str, str]:
    given = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[2]), "CUDA_VISIBLE_DEVICES": "", "COLUMNS": "120"}
    given.pop("DS_ACCELERATOR", None)
    return given


def run(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """With a new interpreter, as people do."""
    return subprocess.run([sys.executable, *words], cwd=folder, env=environment(), capture_output=True, text=True, timeout=60, check=False)


def run_copy(folder: Path, script: str, *words: str) -> subprocess.CompletedProcess[str]:
    """With a copy of a process that has imported everything: for tests that do not ask what is imported."""
    script = str(folder / script)
    return run_script(script, *words, folder=folder, environment=environment(), timeout=60, outputs=folder)


@pytest.mark.parametrize(
    "words",
    [
        ("deepy.py", "worker.py", "-d", "configs", "small.yml", "-o", "seed=7"),
        ("deepy.py", "worker.py", "small", "--conf_dir", "configs", "-o", "seed=7"),
        ("deepy.py", "-d", "configs", "worker.py", "-o", "seed=7", "small"),
        ("worker.py", "-d", "configs", "small", "-o", "seed=7"),
        ("worker.py", "--local_rank=0", "-o", "seed=7", "-d", "configs", "small", "--deepspeed_config", "x"),
    ],
)
def test_forms_of_the_command(folder: Path, words: tuple[str, ...]) -> None:
    done = run(folder, *words)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0] == "2 7 ['small.yml'] ('seed=7',) None"
    assert done.stdout.splitlines()[1].startswith("[]"), "checking a configuration must import nothing heavy"
    assert done.stderr == ""


def test_several_overrides_and_neox_s_flags(folder: Path) -> None:
    words = ("-o", "seed=7", "num_layers=3", "-o", "load=x", "--iteration", "20", "--wandb_group", "a b")
    done = run_copy(folder, "deepy.py", "worker.py", "-d", "configs", "small", *words)
    overrides = "('seed=7', 'num_layers=3', 'load=x', 'wandb_group=\"a b\"', 'iteration=20')"
    assert done.stdout.splitlines()[0] == f"3 7 ['small.yml'] {overrides} 20"


def test_one_process_without_a_gpu_gets_the_cpu_accelerator_and_passes_its_status_on(folder: Path) -> None:
    done = run(folder, "deepy.py", "worker.py", "-d", "configs", "small", "-o", "exit_interval=7")
    assert done.stdout.splitlines()[1] == "[] cpu"
    assert done.returncode == 7


@pytest.mark.parametrize(
    ("words", "overrides"),
    [
        (
            ("generate.py", "-d", "configs", "small", "-i", "in.txt", "-o", "out.txt"),
            """('sample_output_file="out.txt"', 'sample_input_file="in.txt"', 'text_gen_type=input-file')""",
        ),
        (
            ("generate.py", "-d", "configs", "small", "-i", "in.txt", "-o", "text_gen_type=unconditional"),
            """('text_gen_type=unconditional', 'sample_input_file="in.txt"')""",
        ),
        (("-o", "out.txt", "generate.py", "small", "-d", "configs"), """('sample_output_file="out.txt"',)"""),
        (("generate.py", "-d", "configs", "small", "-o", "seed=3", "-o", "out.txt"), """('seed=3', 'sample_output_file="out.txt"')"""),
        (("generate.py", "-d", "configs", "small", "--sample_output_file", "a=b.txt"), """('sample_output_file="a=b.txt"',)"""),
        (("worker.py", "-d", "configs", "small", "-H", "hosts"), """('hostfile="hosts"',)"""),
        (("worker.py", "-d", "configs", "small", "--wandb_run_name", "1", "--wandb_team", "t"), """('wandb_run_name="1"', 'wandb_team="t"')"""),
        (("worker.py", "-d", "configs", "small", "--eval_results_prefix", "x-"), """('eval_results_prefix="x-"',)"""),
        (("worker.py", "-d", "configs", "small", "--eval_tasks", "piqa", "boolq"), """('eval_tasks=["piqa", "boolq"]',)"""),
        (("worker.py", "-d", "configs", "small", "--eval-data", "hub"), """('eval_data="hub"',)"""),
    ],
)
def test_neox_s_flags_become_keys(folder: Path, words: tuple[str, ...], overrides: str) -> None:
    done = run_copy(folder, "deepy.py", *words)
    assert done.stderr == ("deepy.py: 'hostfile' = 'hosts': no such file, so only this machine is used\n" if "-H" in words else "")
    assert overrides in done.stdout.splitlines()[0]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ("deepy.py", "worker.py", "-d", "configs", "small", "-o", "moe_top_k=9"),
            "deepy.py: 1 problem(s) in the configuration:\n  command line: 'moe_top_k' = 9: must be at most moe_num_experts (4); "
            "moe_num_experts is given at configs/small.yml:7\n",
        ),
        (
            ("worker.py", "-d", "configs", "smal"),
            "worker.py: 1 problem(s) in the configuration:\n  configs/smal.yml: no such file; did you mean 'small.yml'?\n",
        ),
        (
            ("deepy.py", "wrker.py", "-d", "configs", "small"),
            "deepy.py: wrker.py: there is no such script, neither in this folder nor in the folder of deepy.py; the scripts are train.py, "
            "eval.py and generate.py\n",
        ),
        (
            ("deepy.py", "configs/small.yml", "other.yml"),
            "deepy.py: configs/small.yml is a configuration file, but the script is missing: write the script first (train.py, eval.py or "
            "generate.py), "
            "such as train.py configs/small.yml other.yml\n",
        ),
        (
            ("deepy.py", "small", "-d", "configs"),
            "deepy.py: small is a configuration file, but the script is missing: write the script first (train.py, eval.py or generate.py), "
            "such as train.py small\n",
        ),
        (
            ("worker.py",),
            "worker.py: 1 problem(s) in the configuration:\n  no configuration files are given; write them after the script, such as: -d "
            "configs quickstart.yml\n",
        ),
        (
            ("worker.py", "--megatron_config", "xyz"),
            "worker.py: 1 problem(s) in the configuration:\n"
            "  the value of --megatron_config was not written by deepy.py; start the script with deepy.py, or give it YAML files\n",
        ),
        (
            ("deepy.py", "train.py", "-d", "configs", "small", "-o", "data_path=null", "train_batch_size=7"),
            "deepy.py: 1 problem(s) in the configuration:\n  command line: 'train_batch_size' = 7: must be a multiple of "
            "train_micro_batch_size_per_gpu (4); train_micro_batch_size_per_gpu is given at configs/small.yml:10\n",
        ),
        (
            ("deepy.py", "train.py", "-d", "configs", "small", "-o", "data_path=null"),
            "deepy.py: 1 problem(s) in the configuration:\n  'data_path' or 'train_data_paths' must be given: the tokens to train on\n",
        ),
        (
            ("deepy.py", "worker.py", "-d", "configs", "small", "-o", "out.txt"),
            "deepy.py: 1 problem(s) in the configuration:\n  command line: 'out.txt' is not an override; write key=value, or key.inner=value for a "
            "value inside a dictionary\n",
        ),
        (
            ("deepy.py", "generate.py", "-d", "configs", "small", "-o", "seed"),
            "deepy.py: 1 problem(s) in the configuration:\n  command line: 'seed' is not an override; write key=value, or key.inner=value for a "
            "value inside a dictionary\n",
        ),
        (
            ("deepy.py", "worker.py", "-d", "configs", "small", "--iteration", "last"),
            "deepy.py: 1 problem(s) in the configuration:\n  command line: 'iteration' = 'last': must be a whole number\n",
        ),
        (
            ("deepy.py", "worker.py", "-d", "configs", "small", "--autotuning", "tune"),
            "deepy.py: 1 problem(s) in the configuration:\n  command line: 'autotuning_run' = 'tune' is not supported: the search for settings "
            "needs DeepSpeed's own training loop; remove it\n",
        ),
    ],
)  # fmt: skip
def test_a_mistake_is_a_sentence_and_status_2(folder: Path, words: tuple[str, ...], message: str) -> None:
    done = run_copy(folder, *words)
    assert done.stderr == message
    assert done.stdout == ""
    assert done.returncode == 2


def test_deepy_without_anything_says_how_to_call_it(folder: Path) -> None:
    done = run_copy(folder, "deepy.py")
    assert done.returncode == 2
    assert "give a script and its configuration files, such as: deepy.py train.py -d configs quickstart.yml" in done.stderr
    assert run_copy(folder, "deepy.py", "--help").returncode == 0


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (("--train_iters", "5"), "--train_iters 5; train_iters is a key of the configuration: write -o train_iters=5"),
        (("--train-iters=5",), "--train-iters=5; train_iters is a key of the configuration: write -o train_iters=5"),
        (("--finetune", "-d", "."), "--finetune; finetune is a key of the configuration: write -o finetune=VALUE"),
        (("--no-such-key", "5"), "--no-such-key 5"),
    ],
)
def test_a_key_that_is_written_as_a_flag_gets_the_override_that_says_it(
    words: tuple[str, ...], hint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        read_deepy_arguments(["train.py", "small.yml", *words])
    assert ended.value.code == 2
    assert capsys.readouterr().err.endswith(f"deepy.py: error: unrecognized arguments: {hint}\n")


def test_help_says_what_the_words_are_and_offers_nothing_that_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        read_deepy_arguments(["--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "SCRIPT CONFIG [CONFIG ...] the script (train.py, eval.py or generate.py), then its YAML files" in shown
    for flag, key in KEY_FLAGS.items():
        refused = isinstance(TABLE.get(key), Refused)
        assert (f"{flag} VALUE" not in shown) == refused, flag


def test_check_shows_what_will_happen_and_runs_nothing(folder: Path) -> None:
    tokenizer = folder / "tokenizer.json"
    overrides = ("num_processes=2", "tokenizer_type=HFTokenizer", f"vocab_file='{tokenizer}'")
    words = ("deepy.py", "train.py", "-d", "configs", "small", "--check", "-o", *overrides)
    done = run(folder, *words)
    assert done.returncode == 0, done.stderr
    assert "Given in small.yml, command line" in done.stdout
    assert "does not exist yet" in done.stdout
    shown = {" ".join(line.split()) for line in done.stdout.splitlines()}
    assert "model num_layers 2 required" in shown
    assert "moe moe_top_k 2 1" in shown
    # 2 layers x 4 experts x two matrices of 64 x 256, of which a token meets 2 experts
    assert "experts 262,144 131,072" in shown
    assert "sequences per step 8 = 4 x 1 accumulation x 2 processes" in shown
    assert "tokens per step 256" in shown
    assert "steps, tokens in all 100, 25,600" in shown
    assert any(line.startswith("memory per process") and "ZeRO stage 0" in line for line in shown)
    assert "'rope_fusion' has no effect here" in done.stdout
    assert "What computes on this machine (cpu)" in done.stdout
    assert any(line.startswith("grouped_gemm ") for line in shown)

    tokenizer.write_text('{"version": "1.0", "model": {"type": "WordLevel", "vocab": {"a": 0, "b": 1, "c": 2}, "unk_token": "a"}}')
    done = run_copy(folder, *words, "-o", "train_iters=null")
    shown = {" ".join(line.split()) for line in done.stdout.splitlines()}
    assert "vocabulary 3, padded to 128" in shown
    assert "embedding 8,192 8,192" in shown
    length = "the number of training steps, or the number of passes through the data"
    assert f"cannot train yet: 'train_iters' or 'train_epochs' must be given: {length}" in " ".join(done.stdout.split())
    assert "fp16" not in done.stdout
    assert "note: training in fp16 needs a GPU" in run_copy(folder, *words, "-o", "precision=fp16").stdout
    done = run_copy(folder, *words, "-o", "train_iters=null", "-o", "train_epochs=3")
    assert "3 passes through the training data; the number of steps is known when the data is read" in done.stdout

    tokenizer.write_text("{}")
    assert "is not a tokenizer.json" in run_copy(folder, *words).stdout


def test_check_fails_for_batch_sizes_that_do_not_multiply_out(folder: Path) -> None:
    words = ("deepy.py", "train.py", "-d", "configs", "small", "--check", "-o", "train_batch_size=32", "gradient_accumulation_steps=8", "num_gpus=2")
    done = run_copy(folder, *words)
    product = "train_micro_batch_size_per_gpu (4) * gradient_accumulation_steps (8) * data-parallel processes (2)"
    assert done.returncode == 2
    assert done.stderr == f"deepy.py: 1 problem(s) in the configuration:\n  'train_batch_size' = 32: must equal {product}\n"
    assert "Given in small.yml, command line" in done.stdout, "what was asked for is shown all the same"
    assert run_copy(folder, *words[:-1], "num_gpus=1").returncode == 0


def test_a_hostfile_that_is_not_there_is_said(folder: Path) -> None:
    words = ("deepy.py", "worker.py", "-d", "configs", "small", "-o", "hostfile=/nowhere/hosts")
    assert "note: 'hostfile' = '/nowhere/hosts': no such file, so only this machine is used\n" in run_copy(folder, *words, "--check").stdout
    done = run_copy(folder, *words)
    assert (done.returncode, done.stderr) == (0, "deepy.py: 'hostfile' = '/nowhere/hosts': no such file, so only this machine is used\n")


def test_scripts_and_configurations_are_found_from_elsewhere(tmp_path: Path, repository: Path) -> None:
    done = run_copy(tmp_path, str(repository / "deepy.py"), "train.py", "-d", "configs", "quickstart.yml", "-o", "seed=7", "--check")
    assert done.stderr == ""
    assert "quickstart.yml" in done.stdout
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs/small.yml").write_text(CONFIG)
    (tmp_path / "train.py").write_text(SCRIPT)
    done = run_copy(tmp_path, str(repository / "deepy.py"), "train.py", "-d", "configs", "small.yml")
    assert done.stdout.startswith("2 1234 ['small.yml']"), "what is here comes first"


def test_a_hostfile_is_checked_and_counted_before_anything_starts(folder: Path) -> None:
    (folder / "hosts").write_text("node-a slots=2\nnode-b slots=two\n")
    said = (
        "deepy.py: 1 problem(s) in the configuration:\n  hosts:2: Hostfile contains a bad entry: node-b slots=two; "
        "write one line for each machine, such as `worker-1 slots=8`, each machine once\n"
    )
    for more in ((), ("--check",)):
        done = run_copy(folder, "deepy.py", "worker.py", "-d", "configs", "small", "-H", "hosts", *more)
        assert (done.returncode, done.stderr) == (2, said)
    (folder / "hosts").write_text("node-a slots=2\nnode-b slots=3\n")
    done = run_copy(folder, "deepy.py", "worker.py", "-d", "configs", "small", "-H", "hosts", "--check")
    assert done.returncode == 0, done.stderr
    assert "20 = 4 x 1 accumulation x 5 processes" in done.stdout
