"""Distillation from a weak teacher: prepare data, train with DeepSpeed, evaluate, report."""

from __future__ import annotations

import argparse
import importlib
import io
import os
import sys
from pathlib import Path

from dwt_ds import __version__
from dwt_ds.base.words import check_fits_a_line

# Subcommand -> what it does. Its module is imported only when it is used, and imports heavy libraries in its `main`, so
# that --help need not wait for them.
SUBCOMMANDS = {
    "prepare": "turn text into a data folder: sentences, tokens, rows",
    "plan": "estimate memory, hours, traffic and disk of a run, before it is started",
    "doctor": "check that this machine, or every host of a hostfile, is ready to train",
    "launch": "start a run on this machine or on a hostfile's hosts, and supervise it until it finishes",
    "watch": "show how a run in progress is doing, and what is wrong with it",
    "verify": "check that the files of a run, a checkpoint, an export or a data set are undamaged",
    "export": "make a Hugging Face folder from a run's checkpoint",
    "glue": "fine-tune an export on GLUE and score it",
    "study": "run a grid of pre-trainings, teachers first",
    "report": "write a page with figures about runs or a study",
}


def main(arguments: list[str] | None = None) -> int:
    """Run a subcommand; 2 for a user's mistake, reported in one line."""
    if "_ARGCOMPLETE" in os.environ:
        from dwt_ds.cli.completion import complete

        complete(os.environ.get("COMP_LINE", ""))
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # letters that the terminal's encoding lacks
    argv = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(prog="dwt-ds", description=__doc__, epilog="dwt-ds COMMAND --help: its options.")
    parser.add_argument("--version", action="version", version=f"dwt-ds {__version__}")
    add_commands(parser, add_help=False)
    chosen = parser.parse_args(argv[:1])
    module = importlib.import_module(f"dwt_ds.cli.{chosen.command}")
    subparser = argparse.ArgumentParser(prog=f"dwt-ds {chosen.command}", description=module.__doc__)
    module.add_arguments(subparser)
    options = subparser.parse_intermixed_args(argv[1:])
    try:
        _check_texts(options)
        if getattr(options, "out", None) is not None:
            from dwt_ds.base.files import check_no_file  # not at the top: --help should not wait for it

            check_no_file(options.out, f"--out {options.out}")
        return int(module.main(options))
    except (ValueError, OSError) as error:
        print(f"error: {in_words(error)}", file=sys.stderr)
        return 2


def add_commands(parser: argparse.ArgumentParser, *, add_help: bool = True) -> dict[str, argparse.ArgumentParser]:
    """Add the subcommands, without their options; name -> parser."""
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    return {name: commands.add_parser(name, help=text, add_help=add_help) for name, text in SUBCOMMANDS.items()}


def _check_texts(options: argparse.Namespace) -> None:
    """Raises ValueError for an option or argument that a message could not show in one line."""
    for name, value in vars(options).items():
        for each in value if isinstance(value, list) else [value]:
            if isinstance(each, (str, Path)):
                try:
                    check_fits_a_line(str(each))
                except ValueError as error:
                    raise ValueError(f"{name.replace('_', '-')}={error}") from None


def in_words(error: ValueError | OSError) -> str:
    """The error's message; where pydantic refused an option's value, the option and what it must be."""
    from pydantic import ValidationError  # not at the top: --help should not wait for it

    if not isinstance(error, ValidationError):
        return str(error)
    from dwt_ds.config.validate import must_be, own_message

    first = error.errors()[0]
    if first["type"] == "value_error":  # our own check of several options
        return own_message(first)
    option = [part for part in first["loc"] if isinstance(part, str)][-1].replace("_", "-")
    return f"--{option}={first['input']}: must be {must_be(first)}"
