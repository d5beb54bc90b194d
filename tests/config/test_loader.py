"""Good files in every style that NeoX users write, and overrides on top."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron.config.loader import LoadedConfig, config_from_dict, load_config
from megatron.config.section import ConfigError

MODEL = {"num_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "seq_length": 32, "max_position_embeddings": 32}
PLAIN = "".join(f"{key}: {value}\n" for key, value in MODEL.items())

NEOX_125M = """# GPT-2 pretraining setup
{
   # parallelism settings ( you will want to change these based on your cluster setup )
   "pipe_parallel_size": 1,
   "model_parallel_size": 1,

   "num_layers": 12,
   "hidden_size": 768,
   "num-attention-heads": 12,
   "seq_length": 2048,
   "max_position_embeddings": 2048,
   "norm": "layernorm",
   "pos_emb": "rotary",
   "no_weight_tying": true,
   "gpt_j_residual": false,
   "output_layer_parallelism": "column",
   "attention_config": [[["flash"], 12]],

   # these should provide some speedup but takes a while to build, set to true if desired
   "scaled_upper_triang_masked_softmax_fusion": false,
   "bias_gelu_fusion": false,
   "rope_fusion": False,
   "layernorm_fusion": false,

   "init_method": "small_init",
   "output_layer_init_method": "wang_init",

   "optimizer": {
     "type": "Adam",
     "params": {
       "lr": 6e-4,
       "betas": [0.9, 0.95],
       "eps": 1.0e-8,
     }
   },
   "min_lr": 6e-5,
   "zero_optimization": {
    "stage": 1,
    "allgather_partitions": True,
    "allgather_bucket_size": 5e8,
    "overlap_comm": True,
    "reduce_scatter": True,
    "reduce_bucket_size": 500000000,
    "contiguous_gradients": True,
  },
   "train_micro_batch_size_per_gpu": 4,
   "data_impl": "mmap",
   "checkpoint_activations": true,
   "checkpoint_num_layers": 1,
   "partition_activations": true,
   "synchronize_each_layer": true,
   "gradient_clipping": 1.0,
   "weight_decay": 0.1,
   "hidden_dropout": 0.0,
   "attention_dropout": 0.0,
   "fp16": {
     "enabled": true,
     "loss_scale": 0,
     "loss_scale_window": 1000,
     "hysteresis": 2,
     "min_loss_scale": 1
   },
   "train_iters": 320000,
   "lr_decay_iters": 320000,
   "distributed_backend": "nccl",
   "lr_decay_style": "cosine",
   "warmup": 0.01,
   "checkpoint_factor": 10000,
   "eval_interval": 1000,
   "eval_iters": 10,
   "log_interval": 100,
   "steps_per_print": 10,
   "keep_last_n_checkpoints": 4,
   "wall_clock_breakdown": true,
   "hostfile": "/mock_path"
}
"""
NEOX_LOCAL_SETUP = """# Suggested data paths when using GPT-NeoX locally
{
  "data_path": "data/enwik8/enwik8_text_document",

  # or for weighted datasets:
  # "train-data-paths": ["data/enwik8/enwik8_text_document"],
  "vocab_file": "data/gpt2-vocab.json",
  "merge_file": "data/gpt2-merges.txt",
  "save": "checkpoints",
  "load": "checkpoints",
  "checkpoint_validation_with_forward_pass": False,
  "tensorboard_dir": "tensorboard",
  "log_dir": "logs",
  "use_wandb": True,
  "wandb_host": "https://api.wandb.ai",
  "wandb_project": "neox"
}
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def load(text: str, *overrides: str, name: str = "a.yml") -> LoadedConfig:
    Path(name).write_text(text)
    return load_config([name], overrides)


def test_files_as_neox_ships_them_load(here: Path) -> None:
    (here / "configs").mkdir()
    (here / "configs" / "125M.yml").write_text(NEOX_125M)
    (here / "configs" / "local_setup.yml").write_text(NEOX_LOCAL_SETUP)
    loaded = load_config(["125M", "local_setup.yml"], conf_dir=Path("configs"))
    config = loaded.config
    assert config.model.head_width == 64
    assert config.optimizer.optimizer.params.lr == 6e-4
    assert config.optimizer.optimizer.params.betas == (0.9, 0.95)
    assert config.optimizer.min_lr == 6e-5
    assert config.optimizer.zero_optimization.model_dump()["allgather_bucket_size"] == 5e8
    assert config.precision == "fp16"
    assert config.logging.use_wandb is True
    assert config.launcher.hostfile == "/mock_path"
    assert loaded.files == {"125M.yml": NEOX_125M, "local_setup.yml": NEOX_LOCAL_SETUP}
    assert [notice.split(":")[2].split("'")[1] for notice in loaded.notices] == ["synchronize_each_layer", "partition_activations"]
    assert loaded.notices[0].startswith("configs/125M.yml:51: 'synchronize_each_layer' has no effect here: ")


@pytest.mark.parametrize(
    "text",
    [
        PLAIN,
        PLAIN.replace("_", "-"),
        json.dumps(MODEL),
        json.dumps(MODEL, indent="\t"),
        "{\n" + "".join(f'  "{key}": {value}, # remark\n' for key, value in MODEL.items()) + "}\n",
        "---\n" + PLAIN,
        "\ufeff" + PLAIN,
        PLAIN.replace("\n", "\r\n"),
    ],
    ids=["plain", "hyphens", "json", "json with tabs", "json with remarks", "document start", "byte order mark", "windows"],
)
def test_every_style_says_the_same(text: str, here: Path) -> None:
    assert load(text).config == config_from_dict(MODEL)


def test_json_files_keep_their_suffix(here: Path) -> None:
    assert load(json.dumps(MODEL), name="a.json").config == config_from_dict(MODEL)


def test_an_exponent_without_a_point_is_a_float_only_where_a_float_is_meant(here: Path) -> None:
    config = load(PLAIN + "warmup: 1e-2\nmoe_losses: {z_loss: 1E-3}\nlog_dir: 1e-3\ntrain_data_weights: null\n").config
    assert config.optimizer.warmup == 0.01
    assert config.moe.moe_losses == {"z_loss": 0.001}
    assert config.logging.log_dir == "1e-3"


def test_choices_are_matched_without_regard_to_case_as_in_neox(here: Path) -> None:
    assert load(PLAIN + "optimizer: {type: adamw, params: {lr: 0.001}}\nnorm: RMSNorm\n").config.optimizer.optimizer.type == "AdamW"


def test_python_spelling_of_booleans(here: Path) -> None:
    assert load(PLAIN + "no_weight_tying: True\ngpt_j_residual: False\n").config.model.no_weight_tying is True


def test_python_spelling_of_null(here: Path) -> None:
    """NeoX's files say None; where a key has the choice 'none' it means that, as NeoX reads choices without regard to case."""
    text = PLAIN + "load: None\ntrain_iters: None\npos_emb: None\nfp16: None\ndeepspeed_extra_args: {comet: {project: None}}\ns3_path: None\n"
    loaded = load(text, "wandb_group=None")
    config = loaded.config
    assert (config.checkpoint.load, config.training.train_iters, config.optimizer.fp16, config.logging.wandb_group) == (None, None, None, None)
    assert config.model.pos_emb == "none"
    assert config.deepspeed.deepspeed_extra_args == {"comet": {"project": None}}
    assert loaded.without_section == {"s3_path": None}


def test_none_in_quotes_is_text(here: Path) -> None:
    assert load(PLAIN + "load: 'None'\nsave: none\ncheckpoint_factor: 1\n").config.checkpoint.load == "None"


@pytest.mark.parametrize("key", ["optimizer", "zero_optimization", "data_types", "deepspeed_extra_args", "moe_losses", "kernel_backends", "plugins"])
def test_null_for_a_dictionary_or_a_list_gives_nothing(key: str, here: Path) -> None:
    assert load(PLAIN + f"{key}: null\n").config == config_from_dict(MODEL)


def test_strict_json_with_everything_that_slurm_needs(here: Path) -> None:
    keys = {
        "launcher": "slurm",
        "deepspeed_slurm": True,
        "hostfile": "hosts",
        "comment": "a run",
        "no_ssh_check": True,
        "optimizer": {"type": "Adam", "params": {"lr": 6e-05, "betas": [0.9, 0.95], "eps": 1e-08}},
        "min_lr": 6e-06,
        "fp16": {"enabled": True, "loss_scale": 0, "loss_scale_window": 1000, "hysteresis": 2, "min_loss_scale": 1},
        "load": None,
        "data-path": "x",
    }
    text = json.dumps({**MODEL, **keys})
    assert "6e-05" in text, "JSON writes numbers in a way that YAML reads as text"
    config = load(text, name="a.json").config
    assert (config.launcher.launcher, config.launcher.deepspeed_slurm, config.launcher.comment) == ("slurm", True, "a run")
    assert (config.optimizer.optimizer.params.lr, config.optimizer.min_lr) == (6e-5, 6e-6)
    assert config.data.data_path == "x"


@pytest.mark.parametrize("value", ["6000", "[6000, 6001]", "'localhost'", "['a', 'b']"])
def test_keys_that_hold_one_or_several(value: str, here: Path) -> None:
    """NeoX declares them so, and refuses the list."""
    load(PLAIN + f"weight_server_port: {value}\nonline_dataserver_ips: {value}\nonline_dataserver_ports: {value}\n")


@pytest.mark.parametrize("factor", ["10", "10.0", "1e1"])
def test_a_whole_number_or_a_float(factor: str, here: Path) -> None:
    assert load(PLAIN + f"checkpoint_factor: {factor}\n").config.checkpoint.checkpoint_factor == 10


def test_null_means_the_same_as_leaving_an_optional_key_out(here: Path) -> None:
    assert load(PLAIN + "gradient_accumulation_steps: null\nload:\n").config.training.gradient_accumulation_steps is None


class TestOverrides:
    def test_they_win_over_files_and_are_recorded(self, here: Path) -> None:
        loaded = load(PLAIN + "seed: 1\n", "seed=2", "num-layers=3")
        assert (loaded.config.training.seed, loaded.config.model.num_layers) == (2, 3)
        assert loaded.overrides == ("seed=2", "num-layers=3")

    def test_dots_reach_into_dictionaries(self, here: Path) -> None:
        optimizer = "optimizer: {type: AdamW, params: {lr: 0.001, betas: [0.9, 0.95]}}\n"
        spec = load(PLAIN + optimizer, "optimizer.params.lr=2e-4").config.optimizer.optimizer
        assert (spec.type, spec.params.lr, spec.params.betas) == ("AdamW", 2e-4, (0.9, 0.95))

    def test_dots_make_the_dictionary_when_no_file_gives_it(self, here: Path) -> None:
        assert load(PLAIN, "zero_optimization.stage=2", "moe_losses.z_loss=1e-3").config.moe.moe_losses == {"z_loss": 0.001}

    def test_a_whole_dictionary_replaces_the_file_s(self, here: Path) -> None:
        assert load(PLAIN + "moe_losses: {z_loss: 1.0}\n", "moe_losses={load_balance: 0.5}").config.moe.moe_losses == {"load_balance": 0.5}

    def test_values_are_yaml(self, here: Path) -> None:
        config = load(PLAIN, "split=90,5,5", "save=", "eval_text_files=[a, b]", "prompt_end='='", "checkpoint_activations=true").config
        assert config.data.split == "90,5,5"
        assert config.checkpoint.save is None
        assert config.evaluation.eval_text_files == ["a", "b"]
        assert config.inference.prompt_end == "="
        assert config.training.checkpoint_activations is True

    def test_other_names_win_over_the_file_too(self, here: Path) -> None:
        assert load(PLAIN + "num_gpus: 4\n", "num_processes=2").config.launcher.num_gpus == 2

    @pytest.mark.parametrize(
        ("override", "problem"),
        [
            ("seed", "command line: 'seed' is not an override; write key=value, or key.inner=value for a value inside a dictionary"),
            ("=3", "command line: '=3' is not an override; write key=value, or key.inner=value for a value inside a dictionary"),
            ("sed=3", "command line: unknown key 'sed'; did you mean 'seed'?"),
            ("seed=[", "command line: 'seed=[': the value is not valid YAML: while parsing a flow node, did not find expected node content"),
            ("seed.x=1", "command line: 'seed.x': 'seed' is not a dictionary but 7"),
            ("moe_top_k=9", "command line: 'moe_top_k' = 9: must be at most moe_num_experts (1)"),
            (
                "hidden_size=66",
                "a.yml:3: 'num_attention_heads' = 4: must divide hidden_size (66); if it does not, give head_dim, the dimension of one head; "
                "hidden_size is given on the command line",
            ),
            (
                "optimizer.params.mu=1",
                "command line: unknown key 'mu' in 'optimizer.params'; allowed: lr, betas, eps, adam_w_mode, momentum, nesterov",
            ),
        ],
    )
    def test_mistakes(self, override: str, problem: str, here: Path) -> None:
        with pytest.raises(ConfigError) as caught:
            load(PLAIN + "seed: 7\n", override)
        assert caught.value.problems == [problem]

    def test_the_same_override_twice(self, here: Path) -> None:
        with pytest.raises(ConfigError, match="command line: 'seed' is given twice"):
            load(PLAIN, "seed=1", "seed=2")


def test_plugins_are_imported_before_names_are_checked(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron.config.components import ROUTERS

    monkeypatch.syspath_prepend(here)
    monkeypatch.setitem(ROUTERS, "placeholder", object)  # so that what the plugin adds is taken away again
    (here / "toy_router_plugin.py").write_text("from megatron.config.components import ROUTERS\nROUTERS['toy'] = object\n")
    try:
        config = load(PLAIN + "plugins: [toy_router_plugin]\nmoe_num_experts: 2\nmoe_router_type: toy\n").config
    finally:
        ROUTERS.pop("toy", None)
    assert config.moe.moe_router_type == "toy"


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("x = (\n", "cannot be read: {file}:1: '(' was never closed"),
        ("\nx = undefined\n", "fails when imported at {file}:2: NameError: name 'undefined' is not defined"),
        ("import no_such_module_here\n", "fails when imported at {file}:1: ModuleNotFoundError: No module named 'no_such_module_here'"),
        ("raise ValueError('no')\n", "fails when imported at {file}:1: ValueError: no"),
    ],
)
def test_a_plugin_that_fails_is_named_with_its_line(text: str, problem: str, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(here)
    file = here / "broken_plugin.py"
    file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load(PLAIN + "plugins: [broken_plugin, '']\n")
    assert [line.partition(": ")[2] for line in caught.value.problems] == [
        f"'plugins' = 'broken_plugin': {problem.format(file=file)}",
        "'plugins' = '': fails when imported: ValueError: Empty module name",
    ]


def test_config_from_dict_names_problems_without_a_place() -> None:
    with pytest.raises(ConfigError) as caught:
        config_from_dict({**MODEL, "moe_num_experts": 8, "moe_top_k": 9, "rope_fusion": True, "sede": 1})
    assert caught.value.problems == ["unknown key 'sede'; did you mean 'seed'?", "'moe_top_k' = 9: must be at most moe_num_experts (8)"]


def test_flat_is_complete_and_loads_again() -> None:
    config = config_from_dict({**MODEL, "bf16": {"enabled": True}, "optimizer": {"params": {"lr": 1e-3}}})
    flat = config.flat()
    assert flat["precision"] == "bfloat16"
    assert flat["seed"] == 1234
    assert flat["optimizer"]["type"] == "Adam"
    assert flat["optimizer"]["params"].items() >= {"lr": 1e-3, "betas": None, "eps": None}.items()
    assert config_from_dict(json.loads(json.dumps(flat))).flat() == flat


def test_a_configuration_cannot_be_written_to() -> None:
    config = config_from_dict(MODEL)
    with pytest.raises(ValueError, match="frozen"):
        config.model.num_layers = 3  # type: ignore[misc]
