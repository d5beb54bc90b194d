"""A loaded configuration as one command-line argument, and back: how deepy.py hands it to the worker processes."""

from __future__ import annotations

import base64
import binascii
import json
import zlib

from megatron.config.loader import LoadedConfig, config_from_dict
from megatron.config.section import ConfigError

# What a LoadedConfig has beside its configuration.
_BESIDES = ("files", "overrides", "notices", "without_section")


def encode(loaded: LoadedConfig) -> str:
    """URL-safe base64 of the compressed JSON of what was given (defaults are left out; `decode` fills them in again)."""
    content = {"given": loaded.config.given(), **{name: getattr(loaded, name) for name in _BESIDES}}
    return base64.urlsafe_b64encode(zlib.compress(json.dumps(content).encode())).decode()


def decode(text: str) -> LoadedConfig:
    """The inverse of `encode`. Raises ConfigError for text that `encode` did not make."""
    try:
        content = json.loads(zlib.decompress(base64.urlsafe_b64decode(text.encode())))
        given, files, overrides, notices, without_section = (content[name] for name in ("given", *_BESIDES))
    except (binascii.Error, zlib.error, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            ["the value of --megatron_config was not written by deepy.py; start the script with deepy.py, or give it YAML files"]
        ) from error
    return LoadedConfig(config_from_dict(given), files, tuple(overrides), tuple(notices), without_section)
