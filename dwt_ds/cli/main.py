"""`dwt-ds`: prepare data, and what else surrounds a run of `deepspeed --module dwt_ds.pretrain`."""

from __future__ import annotations

import argparse
import importlib
import sys

# Subcommand -> its module; loaded only when asked for, since some pull in heavy libraries.
SUBCOMMANDS = {
    "doctor": "dwt_ds.cli.doctor",
    "export": "dwt_ds.cli.export",
    "glue": "dwt_ds.cli.glue",
    "plan": "dwt_ds.cli.plan",
    "prepare": "dwt_ds.cli.prepare",
    "report": "dwt_ds.cli.report",
    "study": "dwt_ds.cli.study",
    "verify": "dwt_ds.cli.verify",
}


def main(arguments: list[str] | None = None) -> int:
    """Run a subcommand; 2 for a user's mistake, told in one line."""
    parser = argparse.ArgumentParser(prog="dwt-ds", description=__doc__)
    parser.add_argument("command", choices=sorted(SUBCOMMANDS), help="; see dwt-ds COMMAND --help")
    argv = sys.argv[1:] if arguments is None else arguments
    chosen = parser.parse_args(argv[:1])
    module = importlib.import_module(SUBCOMMANDS[chosen.command])
    subparser = argparse.ArgumentParser(prog=f"dwt-ds {chosen.command}", description=module.__doc__)
    module.add_arguments(subparser)
    options = subparser.parse_intermixed_args(argv[1:])
    try:
        return int(module.main(options))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
