"""Preparing, training and reporting from Python: what the command lines do, for notebooks and schedulers.

>>> from dwt_ds import prepare, pretrain, report
>>> prepare("data/mine", text=["corpus.txt"], train_tokenizer=8000)
>>> settings = {"data.dir": "data/mine", "teacher.path": None, "output_dir": "runs/mine", "train.max_steps": 50}
>>> run = pretrain("quickstart", settings)
>>> report(run.path)
"""

from __future__ import annotations

import argparse
import json
import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dwt_ds.base.processes import own_command, path_argument
from dwt_ds.base.quiet import quieten_libraries
from dwt_ds.base.words import nearest

if TYPE_CHECKING:
    from dwt_ds.data.manifest import Manifest
    from dwt_ds.study.records import RunRecord

PathLike = str | os.PathLike[str]


def prepare(
    out: PathLike, *, text: PathLike | Sequence[PathLike] = (), dataset: str | Sequence[str] = (), **options: Any
) -> Manifest:
    """Make a data folder for training out of raw text, as `dwt-ds prepare` does; a finished one is left as it is.

    Args:
        out: the data folder.
        text: files or globs.
        dataset: names on the Hugging Face hub (NAME[:CONFIG[:SPLIT]]), or local folders that `datasets` reads.
        options: the other options of `dwt-ds prepare`, with underscores: train_tokenizer=8000, docs=True, every=4.

    Returns:
        The folder's manifest: `rows` (for training), `validation_rows`, `tokens` (of both), `documents`, ...

    Raises:
        TypeError: an unknown option.
        ValueError, OSError: what the command would refuse, in one line.

    Warns:
        UserWarning: what the command prints as a warning, such as text that was dropped.
    """
    from dwt_ds.cli import prepare as command
    from dwt_ds.cli.main import in_words
    from dwt_ds.data.show import warnings_of
    from dwt_ds.prepare.pipeline import prepare as prepare_data

    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    args = parser.parse_args(["--out", path_argument(out)])
    flags = {flag.lstrip("-").replace("-", "_"): action for flag, action in parser._option_string_actions.items()}
    known = flags.keys() - {"h", "help", "out", "text", "dataset", "show"}
    for name, value in options.items():
        if name not in known:
            raise TypeError(f"prepare() has no option {name!r}{nearest(name, sorted(known))}")
        if isinstance(value, os.PathLike):
            value = os.fspath(value)
        # `--uncased` switches `cased` off.
        setattr(args, flags[name].dest, not value if flags[name].const is False else value)
    args.text, args.dataset = [os.fspath(each) for each in _several(text)], _several(dataset)
    try:
        manifest = prepare_data(command.prepare_options(args))
    except ValueError as error:
        raise ValueError(in_words(error)) from error
    for warning in warnings_of(manifest):
        warnings.warn(warning, stacklevel=2)
    return manifest


def pretrain(
    recipe: PathLike,
    overrides: Sequence[str] | Mapping[str, Any] = (),
    *,
    deepspeed_config: PathLike | None = None,
    ranks: int | None = None,
    hostfile: PathLike | None = None,
) -> RunRecord:
    """Pre-train a student, as `dwt-ds launch` does, whose lines are printed here.

    Called again, it resumes a run that was stopped and leaves a complete one as it is. Ctrl-C, or the interrupt of
    a notebook, lets the run save a checkpoint and is raised again.

    Args:
        recipe: path of a recipe, or the name of a packaged one.
        overrides: settings that replace the recipe's: strings ("train.max_steps=50") or a mapping
            ({"train.max_steps": 50}, {"teacher.path": None}).
        deepspeed_config: a DeepSpeed JSON, by path or packaged name; None: that in DEEPSPEED_CONFIG, or the
            recipe's.
        ranks: on this machine; None: one for each GPU, or 2 on a CPU.
        hostfile: instead of `ranks`: hosts, one on each line ("HOST slots=N").

    Returns:
        The run: `path`, `finished` (False if it was asked to stop and can be resumed), `training` and `held_out` (rows
        of its metrics), `final_loss` (the last held-out loss, nats per masked token; only if data are held out).

    Raises:
        ValueError, OSError: what a run would refuse, in one line.
        RuntimeError: the run failed; its message has the exit code, the lines above it the reason.
    """
    if ranks is not None and hostfile is not None:
        raise ValueError("ranks and hostfile: give one of them; a hostfile has the ranks of each host")
    from dwt_ds.config.recipe import load_recipe
    from dwt_ds.launch.commands import run_printed
    from dwt_ds.launch.supervise import STOPPED
    from dwt_ds.study.records import named_runs

    words = _words(overrides)
    folder = Path(load_recipe(os.fspath(recipe), words).config.output_dir)
    options = {"--ranks": ranks, "--hostfile": hostfile, "--deepspeed_config": deepspeed_config}
    given = [word for name, value in options.items() if value is not None for word in (name, path_argument(str(value)))]
    code, lines = run_printed(own_command("launch", *given, path_argument(recipe), *words))
    if code not in (0, STOPPED):
        # The launcher says more after the ranks' own error.
        errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
        if code == 2 and errors:
            raise ValueError(errors[-1])
        raise RuntimeError(f"{folder}: the run ended with exit code {code}; its lines are above")
    return named_runs([folder])[0]


def report(*runs: PathLike | Iterable[PathLike], out: PathLike | None = None, against: PathLike | None = None) -> Path:
    """Write the page of runs or of a study, as `dwt-ds report` does; needs matplotlib (`dwt-ds[study]`).

    Args:
        runs: folders of runs, one by one or in a list, or the folder of one study.
        out: folder to write; None: `report` in the run or study, or beside the runs.
        against: name or path of the run, or a series of the study, with which the others are compared.

    Returns:
        The HTML file; its table as Markdown is `results.md` beside it.

    Raises:
        ValueError, OSError: what the command would refuse, in one line.
    """
    from dwt_ds.cli.report import check_matplotlib

    check_matplotlib()
    quieten_libraries()
    from dwt_ds.study.report import write_report

    paths = [Path(path) for each in runs for path in _several(each)]
    if not paths:
        raise ValueError("report() needs the folder of a run or study")
    return write_report(paths, None if out is None else Path(out), None if against is None else os.fspath(against))


def _several(value: Any) -> list[Any]:
    """A path or name alone is a list of one."""
    return [value] if isinstance(value, (str, os.PathLike)) else list(value)


def _words(overrides: Sequence[str] | Mapping[str, Any]) -> list[str]:
    """Overrides as the command line has them."""
    if not isinstance(overrides, Mapping):
        return _several(overrides)
    from dwt_ds.config.overrides import override_of

    return [
        override_of(key, os.fspath(value))
        if isinstance(value, (str, os.PathLike))
        else f"{key}={json.dumps(value, default=os.fspath)}"
        for key, value in overrides.items()
    ]
