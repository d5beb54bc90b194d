"""The facade for scripts that know GPT-NeoX's NeoXArgs, in the manner of NeoX's own tests: load, read, start, hand on."""

from __future__ import annotations

import ast
import itertools
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron.config.aliases import OTHER_DEFAULTS
from megatron.config.section import ConfigError
from megatron.neox_arguments import NeoXArgs
from tests.config.test_neox_keys import KEYS
from tests.test_code_shape import python_files

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = ROOT / "configs"
LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # the compiled one, where it is there, takes a tenth of the time
FILES = {path.relative_to(CONFIGS).as_posix(): yaml.load(path.read_text(), LOADER) for path in sorted(CONFIGS.rglob("*.yml"))}
MODELS = [name for name, keys in FILES.items() if "num_layers" in keys]
SETUPS = [name for name in FILES if name not in MODELS and "/" not in name]
MODEL: dict[str, Any] = {
    "num_layers": 2,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "seq_length": 32,
    "max_position_embeddings": 32,
    "train_micro_batch_size_per_gpu": 4,
}
# NeoX's, with everything that a file of its own would say.
TEXT = """
"num-layers": 2
"hidden_size": 64
"num_attention_heads": 4
"seq_length": 32
"max_position_embeddings": 32
"optimizer": {"type": "Adam", "params": {"lr": 6e-4, "betas": [0.9, 0.95], "eps": 1.0e-8}}
"zero_optimization": {"stage": 1, "reduce_bucket_size": 5e8, "reduce_scatter": True}
"train_batch_size": 32
"train_micro_batch_size_per_gpu": 4
"fp16": {"enabled": true, "loss_scale": 0}
"rope_fusion": True
"lora_rank": 8
"deepspeed_extra_args": {"comms_logger": {"enabled": true}, "log_level": "error"}
"attention_config": [[["flash"], "all"]]
"wandb_group": None
"""


@pytest.fixture(autouse=True)
def _one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "DLTS_HOSTFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "a.yml").write_text(TEXT)
    return tmp_path / "a.yml"


class TestLoading:
    @pytest.mark.parametrize(("model", "setup"), [*((name, None) for name in MODELS), *itertools.product(["19M.yml", "pythia/70M.yml"], SETUPS)])
    def test_every_value_of_a_shipped_file_can_be_read(self, model: str, setup: str | None) -> None:
        names = [name for name in (model, setup) if name]
        args = NeoXArgs.from_ymls([str(CONFIGS / name) for name in names], {"global_num_gpus": 1, "num_gpus": None})
        for key, value in {key: value for name in names for key, value in FILES[name].items()}.items():
            if key not in ("attention_config", "num_gpus", "global_num_gpus"):
                assert getattr(args, key.replace("-", "_")) == value, key

    @pytest.mark.parametrize("key", KEYS, ids=lambda key: key.key)
    def test_every_key_of_neox_s_has_its_default(self, key: Any) -> None:
        value = getattr(NeoXArgs(**MODEL), key.key)
        derived = {
            **MODEL,
            **dict.fromkeys(("batch_size", "train_batch_size", "train_micro_batch_size_per_gpu"), 4),
            "attention_config": ["global", "global"],
            "precision": "fp32",
            "zero_stage": 0,
            "zero_reduce_scatter": True,
            "zero_contiguous_gradients": False,
            "zero_reduce_bucket_size": 500_000_000,
            "zero_allgather_bucket_size": 500_000_000,
            "optimizer_type": "Adam",
            "dynamic_loss_scale": False,
            "text_gen_type": "unconditional",
            "config_files": {},
            "rank": 0,
            "local_rank": 0,
            "world_size": 1,
            "global_num_gpus": 1,
            "gradient_accumulation_steps": 1,
        }
        if key.key in derived:
            assert value == derived[key.key]
        elif key.key not in OTHER_DEFAULTS:
            assert value == key.default

    def test_values_are_those_that_a_run_would_use(self, file: Path) -> None:
        args = NeoXArgs.from_ymls([file])
        assert (args.train_batch_size, args.batch_size, args.gradient_accumulation_steps) == (32, 4, 8)
        assert (args.precision, args.dynamic_loss_scale, args.lr, args.optimizer_type) == ("fp16", True, 6e-4, "Adam")
        assert (args.zero_stage, args.zero_reduce_bucket_size, args.zero_allgather_bucket_size) == (1, 5e8, 500_000_000)
        assert args.optimizer == {"type": "Adam", "params": {"lr": 6e-4, "betas": [0.9, 0.95], "eps": 1e-8}}
        assert args.attention_config == ["flash", "flash"]
        assert (args.clip_grad, args.is_pipe_parallel, args.padded_vocab_size, args.iteration) == (1.0, False, None, None)
        assert (args.rope_fusion, args.wandb_group, args.lora_rank, args.moe_lore_rank) == (True, None, 8, 8)
        assert args.deepspeed_extra_args == {"comms_logger": {"enabled": True}, "log_level": "error"}
        assert args.comms_logger == {"enabled": True}
        assert args.config_files == {"a.yml": TEXT}

    def test_more_processes_share_the_batch(self, file: Path) -> None:
        args = NeoXArgs.from_ymls([file], {"num_gpus": 2})
        assert (args.train_batch_size, args.batch_size, args.gradient_accumulation_steps, args.global_num_gpus) == (32, 4, 4, 2)

    def test_weights_and_pipelines_and_prompts(self) -> None:
        paths = {f"{part}_data_paths": ["a", "b"] for part in ("train", "valid", "test")}
        args = NeoXArgs(**MODEL, **paths, pipe_parallel_size=1, sample_input_file="in.txt", test_data_weights=[1.0, 3.0])
        assert (args.train_data_weights, args.test_data_weights, args.is_pipe_parallel) == ([1.0, 1.0], [1.0, 3.0], True)
        assert args.text_gen_type == "input-file"

    def test_overwritten_values_win(self, file: Path) -> None:
        args = NeoXArgs.from_ymls([str(file)], overwrite_values={"num_layers": 3, "load": "x", "user_script": "train.py", "optimizer": None})
        assert (args.num_layers, args.load, args.user_script, args.optimizer) == (3, "x", "train.py", None)

    @pytest.mark.parametrize(
        ("make", "problem"),
        [
            (lambda file: NeoXArgs(), "'num_layers' must be given: Number of transformer layers"),
            (lambda file: NeoXArgs.from_dict({**MODEL, "num_layrs": 2}), "unknown key 'num_layrs'; did you mean 'num_layers'?"),
            (lambda file: NeoXArgs.from_ymls([file.with_name("b.yml")]), "{folder}/b.yml: no such file; did you mean 'a.yml'?"),
            (lambda file: NeoXArgs.from_ymls([file], {"seed": "x"}), "command line: 'seed' = 'x': must be a whole number"),
            (
                lambda file: NeoXArgs.from_ymls([file], {"seed": {1}}),
                "'seed' = {{1}}: only numbers, texts, lists and dictionaries can be handed to other processes",
            ),
            (
                lambda file: NeoXArgs.from_dict({**MODEL, "train_batch_size": 7}),
                "'train_batch_size' = 7: must be a multiple of train_micro_batch_size_per_gpu (4)",
            ),
            (
                lambda file: NeoXArgs(**MODEL, train_batch_size=32, gradient_accumulation_steps=4),
                "'train_batch_size' = 32: must equal "
                "train_micro_batch_size_per_gpu (4) * gradient_accumulation_steps (4) * data-parallel processes (1)",
            ),
            (
                lambda file: NeoXArgs(**MODEL, batch_size=5),
                "'batch_size' = 5 is not supported: it is another name of train_micro_batch_size_per_gpu; write that name",
            ),
            (lambda file: NeoXArgs(**MODEL).update_value("num_layer", 3), "unknown key 'num_layer'; did you mean 'num_layers'?"),
            (lambda file: NeoXArgs(**MODEL).get_deepspeed_main_args(), "'user_script' must be given: the script that the processes run"),
            (lambda file: NeoXArgs.consume_deepy_args(["no.py", str(file)]), "no.py: no such script"),
            (
                lambda file: NeoXArgs.consume_neox_args(input_args=["train.py"]),
                "--megatron_config is missing: start the script with deepy.py, or make the object with from_ymls",
            ),
            (
                lambda file: NeoXArgs.consume_neox_args(input_args=["--megatron_config", "e30="]),
                "the value of --megatron_config was not written by deepy.py; start the script with deepy.py, or give it YAML files",
            ),
        ],
    )  # fmt: skip
    def test_mistakes_are_sentences(self, make: Any, problem: str, file: Path) -> None:
        with pytest.raises(ConfigError) as caught:
            make(file)
        assert caught.value.problems[0] == problem.format(folder=file.parent)

    def test_a_name_that_is_no_key(self) -> None:
        with pytest.raises(AttributeError, match=r"NeoXArgs has no 'num_layer'; did you mean 'num_layers'\?"):
            _ = NeoXArgs(**MODEL).num_layer


class TestCommandLine:
    """As NeoX tests them: the same object however its files are named."""

    @pytest.mark.parametrize(
        "words",
        [
            ("{root}/configs/125M.yml", "{root}/configs/local_setup.yml"),
            ("{root}/configs/125M", "{root}/configs/local_setup"),
            ("-d", "{root}/configs", "125M.yml", "local_setup.yml"),
            ("125M", "local_setup", "--conf_dir", "{root}/configs"),
        ],
    )
    def test_deepy_s_arguments(self, words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
        script = str(ROOT / "train.py")
        expected = NeoXArgs.from_ymls([str(CONFIGS / "125M.yml"), str(CONFIGS / "local_setup.yml")])
        expected.update_value("user_script", script)
        arguments = [script, *(word.format(root=ROOT) for word in words)]
        assert NeoXArgs.consume_deepy_args(arguments) == expected
        monkeypatch.setattr(sys, "argv", ["deepy.py", *arguments])
        assert NeoXArgs.consume_deepy_args() == expected

    def test_flags_win_over_files(self, file: Path) -> None:
        flags = ["--hostfile", "hosts", "--wandb_group", "g", "--wandb_team", "t", "--iteration", "7", "-i", "in.txt", "--sample_output_file", "o"]
        args = NeoXArgs.consume_deepy_args([str(ROOT / "generate.py"), str(file), *flags, "-o", "load=x"])
        assert (args.hostfile, args.wandb_group, args.wandb_team, args.iteration) == ("hosts", "g", "t", 7)
        assert (args.sample_input_file, args.sample_output_file, args.text_gen_type) == ("in.txt", "o", "input-file")


class TestHandingOn:
    def test_a_dictionary_of_everything_makes_an_equal_object(self, file: Path) -> None:
        for args in (NeoXArgs.from_ymls([file]), NeoXArgs.from_ymls([CONFIGS / "pythia" / "1B.yml", CONFIGS / "local_setup.yml"])):
            again = NeoXArgs.from_dict(args.all_config)
            assert again == args
            assert again != NeoXArgs.from_dict({**args.all_config, "seed": 7})

    def test_a_worker_process_gets_the_same(self, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        args = NeoXArgs.from_ymls([file])
        args.update_value("user_script", str(ROOT / "train.py"))
        arguments = args.get_deepspeed_main_args()
        assert arguments[-3:-1] == [str(ROOT / "train.py"), "--megatron_config"]
        monkeypatch.setattr(sys, "argv", arguments)
        for loaded in (NeoXArgs.consume_neox_args(), NeoXArgs.consume_neox_args(input_args=arguments)):
            assert loaded == args
            assert loaded.megatron_config == args.megatron_config
            assert loaded.deepspeed_config == args.deepspeed_config
            assert loaded.lora_rank == 8
        loaded = NeoXArgs.consume_neox_args(overwrite_values={"load": "x", "num_layers": 4})
        assert (loaded.load, loaded.num_layers, loaded.user_script) == ("x", 4, args.user_script)
        assert loaded.attention_config == ["flash"] * 4

    def test_what_was_written_since_travels_too(self, file: Path) -> None:
        args = NeoXArgs.from_ymls([file])
        args.train_iters, args.user_script, args.padded_vocab_size, args.wandb_group = 17, "train.py", 512, "g"
        args.update_values({"do_train": True, "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}}})
        args.tokenizer = object()  # no key: an ordinary attribute
        again = NeoXArgs.consume_neox_args(input_args=args.get_deepspeed_main_args())
        assert again == args.__class__.from_dict({**args.all_config, "optimizer_type": None, "lr": None})
        assert (again.train_iters, again.padded_vocab_size, again.wandb_group, again.do_train) == (17, 512, "g", True)
        assert (again.lr, again.optimizer_type) == (1e-3, "AdamW")
        assert args.deepspeed_config["train_batch_size"] == 32
        assert "tokenizer" not in args.all_config

    @pytest.mark.parametrize(
        ("key", "value", "problem"),
        [
            ("num_layers", "3", "'num_layers' = '3': must be a whole number; write 3"),
            ("use_mup", True, "'use_mup' = true is not supported: muP is not part of this version; remove it"),
            ("padded_vocab_size", {1}, "'padded_vocab_size' = {1}: only numbers, texts, lists and dictionaries can be handed to other processes"),
        ],
    )
    def test_what_was_written_is_checked_then(self, key: str, value: Any, problem: str) -> None:
        args = NeoXArgs(**MODEL, user_script="train.py")
        setattr(args, key, value)
        with pytest.raises(ConfigError) as caught:
            args.get_deepspeed_main_args()
        assert caught.value.problems == [problem]

    def test_the_launcher_s_options_come_first(self, file: Path, tmp_path: Path) -> None:
        (tmp_path / "hosts").write_text("a slots=1\nb slots=1\n")
        values = {"hostfile": str(tmp_path / "hosts"), "user_script": "train.py", "no_ssh_check": True, "deepspeed_slurm": True}
        args = NeoXArgs.from_ymls([file], values)
        words = args.get_deepspeed_main_args()
        assert words[: words.index("train.py")] == [
            "--hostfile",
            str(tmp_path / "hosts"),
            "--master_port",
            "29500",
            "--launcher",
            "slurm",
            "--no_ssh_check",
        ]
        assert (args.global_num_gpus, args.deepspeed_runner["hostfile"]) == (2, str(tmp_path / "hosts"))
        assert "hostfile" not in args.megatron_config
        assert "zero_optimization" not in args.megatron_config

    def test_the_process_is_found_in_the_environment(self, monkeypatch: pytest.MonkeyPatch) -> None:
        args = NeoXArgs(**MODEL)
        for name, value in (("RANK", "3"), ("LOCAL_RANK", "1"), ("WORLD_SIZE", "4")):
            monkeypatch.setenv(name, value)
        args.configure_distributed_args()
        assert (args.rank, args.local_rank, args.world_size) == (3, 1, 4)

    def test_a_script_started_by_deepy(self, file: Path) -> None:
        """A script of somebody's own: it sees what deepy.py was given, and nothing has imported torch on the way."""
        script = file.with_name("mine.py")
        script.write_text(
            "import sys\n"
            "from megatron.neox_arguments import NeoXArgs\n"
            "args = NeoXArgs.consume_neox_args()\n"
            "print(args.num_layers, args.seed, args.lr, args.user_script, list(args.config_files), 'torch' in sys.modules)\n"
        )
        command = [sys.executable, str(ROOT / "deepy.py"), str(script), str(file), "-o", "seed=5"]
        environment = os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
        done = subprocess.run(command, env=environment, cwd=file.parent, capture_output=True, text=True, timeout=60, check=False)
        assert done.stdout == f"2 5 0.0006 {script} ['a.yml'] False\n", done.stderr


def test_nothing_of_ours_imports_it() -> None:
    for path in python_files(ROOT):
        if path.name in ("neox_arguments.py", "test_neox_arguments.py"):
            continue
        text = path.read_text(encoding="utf-8")
        for node in ast.walk(ast.parse(text)) if "neox_arguments" in text else ():
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
            module = getattr(node, "module", None) or ""
            assert not any("neox_arguments" in name for name in [module, *names]), path
