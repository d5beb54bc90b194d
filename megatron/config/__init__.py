"""Typed configuration. Imports neither torch nor deepspeed, so that a launcher can check a configuration in a fraction of a second."""

from megatron.config.loader import LoadedConfig, config_from_dict, load_config
from megatron.config.neox import NeoXConfig, check_trainable
from megatron.config.section import ConfigError
from megatron.config.training import Batch, resolve_batch

__all__ = ["Batch", "ConfigError", "LoadedConfig", "NeoXConfig", "check_trainable", "config_from_dict", "load_config", "resolve_batch"]
