"""Those options of DeepSpeed's launcher that decide where ranks will be and who starts them.

Read here, without DeepSpeed, because they have to be known before anything is started.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import NamedTuple, NoReturn


class Options(NamedTuple):
    """With DeepSpeed's own defaults."""

    include: str = ""
    """NODE_SPEC[@NODE_SPEC ...], where NODE_SPEC is NAME[:SLOT[,SLOT ...]]."""
    exclude: str = ""
    num_nodes: int = -1
    num_gpus: int = -1
    launcher: str = "pdsh"
    no_ssh: bool = False


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(f"DEEPSPEED_ARGS: {message}")


def read_options(arguments: Sequence[str]) -> Options:
    """What `arguments` say of them, in every spelling that DeepSpeed takes; other options are left alone.

    Raises ValueError for a value that is missing or no number.
    """
    parser = _Parser(add_help=False)
    parser.add_argument("-i", "--include", default="")
    parser.add_argument("-e", "--exclude", default="")
    parser.add_argument("--num_nodes", type=int, default=-1)
    parser.add_argument("--num_gpus", "--num_accelerators", type=int, default=-1)
    parser.add_argument("--launcher", type=str.lower, default="pdsh")
    parser.add_argument("--no_ssh", action="store_true")
    known, _ = parser.parse_known_args(list(arguments))
    return Options(**vars(known))
