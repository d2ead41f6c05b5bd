"""Completion of dwt-ds in the shell, by argcomplete: commands, options, their choices, recipes, settings, files.

eval "$(register-python-argcomplete dwt-ds)"      bash or zsh; argcomplete's page has fish and others
"""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Callable, Sequence
from typing import Any

from dwt_ds.cli.main import add_commands

Completer = Callable[..., list[str]]


def complete(line: str) -> None:
    """Answer the shell, which has set argcomplete's variables, and exit; `line` is what the user has typed so far."""
    import argcomplete

    argcomplete.autocomplete(whole_parser(line.split()))


def whole_parser(words: Sequence[str]) -> argparse.ArgumentParser:
    """The parser of dwt-ds with the options of the commands that are among `words`; others would only cost time."""
    parser = argparse.ArgumentParser(prog="dwt-ds")
    for name, subparser in add_commands(parser).items():
        if name in words:
            importlib.import_module(f"dwt_ds.cli.{name}").add_arguments(subparser)
            for action in subparser._actions:
                completer = _COMPLETERS.get(action.dest)
                if completer is not None:
                    action.completer = completer  # type: ignore[attr-defined]
    return parser


def _recipes(prefix: str, **others: Any) -> list[str]:
    from argcomplete.completers import FilesCompleter

    from dwt_ds.config.recipe import recipe_names

    return [*recipe_names(), *FilesCompleter(["yaml", "yml"])(prefix, **others)]


def _settings(**_: Any) -> list[str]:
    from dwt_ds.base.trees import flatten
    from dwt_ds.config.schema import RunConfig

    return [f"{name}=" for name in flatten(RunConfig().to_dict())]


_COMPLETERS: dict[str, Completer] = {"recipe": _recipes, "overrides": _settings}
