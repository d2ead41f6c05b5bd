"""Fine-tune a checkpoint on the tasks of GLUE and score it.

Trains with the settings of Lee et al. (2023), once per task and seed, and scores the last weights on the validation
set. Writes results.json and prints a table with means and standard deviations over seeds, and the mean of the seven
tasks. Uses all GPUs, one fine-tuning at a time on each. After an interruption the same command resumes; finished
fine-tunings are not run again.
"""

from __future__ import annotations

import argparse
import os
import sys

from dwt_ds.base.processes import home_path
from dwt_ds.cli.options import options_of
from dwt_ds.glue.options import FineTuning, GlueOptions, check_packages
from dwt_ds.glue.tasks import SEVEN, TASKS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    on_request = ", ".join(task.name for task in TASKS if task.name not in SEVEN)
    default = FineTuning()
    parser.add_argument(
        "--model", required=True, metavar="DIR", help="a Hugging Face folder with its tokenizer, or a name on the hub"
    )
    parser.add_argument(
        "--glue-dir",
        type=home_path,
        metavar="DIR",
        help="folder with GLUE's own TSV files (CoLA/train.tsv, ...); a files.json in it may name others; default: "
        "nyu-mll/glue on the hub",
    )
    parser.add_argument(
        "--tasks",
        default=",".join(SEVEN),
        metavar="A,B",
        help=f"tasks, separated by commas (default: %(default)s); {on_request} only if named here",
    )
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="seeds 0 to N-1 (default: %(default)s)")
    parser.add_argument("--out", type=home_path, required=True, metavar="DIR", help="folder for results.json")

    training = parser.add_argument_group("fine-tuning")
    training.add_argument(
        "--learning-rate",
        type=float,
        default=default.learning_rate,
        metavar="X",
        help="falls linearly to 0 (default: %(default)s)",
    )
    training.add_argument(
        "--batch-size", type=int, default=default.batch_size, metavar="N", help="rows (default: %(default)s)"
    )
    epochs = ", ".join(f"{task.name} {task.epochs}" for task in TASKS if task.epochs != 3)
    training.add_argument("--epochs", type=int, metavar="N", help=f"default: 3; {epochs}")
    training.add_argument(
        "--max-length", type=int, metavar="N", help="tokens a row; default: 128, or what the model has positions for"
    )
    training.add_argument(
        "--precision",
        choices=("fp32", "bf16"),
        default=default.precision,
        help="bf16: GPUs only (default: %(default)s)",
    )
    training.add_argument(
        "--quantize",
        choices=("w8a8", "w4a8"),
        help="quantize the encoder of each fine-tuned model, and score the result",
    )
    budget = parser.add_argument_group("small budgets (recorded in the results)")
    budget.add_argument("--max-train-rows", type=int, metavar="N", help="train on a sample of N rows per task")
    budget.add_argument("--max-steps", type=int, metavar="N", help="stop after N optimizer steps per task")


def main(args: argparse.Namespace) -> int:
    check_packages()
    from dwt_ds.base.quiet import quieten_libraries

    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    quieten_libraries()
    from dwt_ds.glue.run import score_checkpoint
    from dwt_ds.glue.scores import table

    given = options_of(GlueOptions, args) | {"tasks": tuple(name for name in args.tasks.split(",") if name.strip())}
    options = GlueOptions(**given, settings=FineTuning(**options_of(FineTuning, args)))
    try:
        results = score_checkpoint(options)
    except KeyboardInterrupt:
        print("interrupted: the same command resumes from here", file=sys.stderr)
        return 130
    print(f"\n{table(results)}\nwritten: {args.out / 'results.json'}")
    return 1 if results["failed"] else 0
