"""From a command line to running processes.

One process replaces deepy.py; several on one machine are its children; on several machines a program for that is run, with DeepSpeed's commands.
Nothing here imports torch, and only a hostfile, include or exclude make machines.py import DeepSpeed, whose parsers read them: a mistake in a
YAML file is reported in a fraction of a second.
"""

from megatron.launcher.command_line import config_from_argv, main

__all__ = ["config_from_argv", "main"]
