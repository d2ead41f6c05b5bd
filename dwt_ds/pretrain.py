"""Pre-train a student, with a weak teacher's help or alone; what the `deepspeed` launcher runs.

deepspeed --num_gpus 2 --module dwt_ds.pretrain quickstart output_dir=runs/mine train.max_steps=100

Called as a function, this module is `dwt_ds.api.pretrain`, which starts the launcher.
"""

from __future__ import annotations

import argparse
import faulthandler
import sys
import traceback
from typing import TYPE_CHECKING

from dwt_ds import CallableModule
from dwt_ds.base.locks import OccupiedError, release_locks
from dwt_ds.base.quiet import quieten_libraries
from dwt_ds.base.streams import outlive_lost_output
from dwt_ds.run.stop import StopRequest, exit_alone

if TYPE_CHECKING:
    from dwt_ds.run.session import Session

sys.modules[__name__].__class__ = CallableModule


def train(session: Session) -> None:
    """The loop: a step is `gradient_accumulation_steps` micro-batches on every rank."""
    for step in session.steps():
        micro_batches = session.micro_batches.next_step()
        numbers = session.begin_step(step, micro_batches)
        for batch, teacher_view in session.micro_batches.with_teacher(micro_batches):
            loss = session.student(batch, teacher_view, numbers.scalars)
            session.student.backward(session.record(loss))
            session.student.step()
            del teacher_view, loss  # a release of the teacher at the step's end would not free what these hold
        session.end_step(numbers)
    session.finish()


def main(arguments: list[str] | None = None) -> int:
    """Parse, assemble, train.

    Exit code 0: complete, or stopped on request and saved; 1: not exported, or an unexpected error; 2: a user's
    mistake; 3: too many skipped steps.
    """
    outlive_lost_output()
    parser = argparse.ArgumentParser(prog="dwt_ds.pretrain", description=__doc__, allow_abbrev=False)
    parser.add_argument("recipe", help="path of a recipe, or the name of a packaged one")
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="key=value", help="dotted settings that replace the recipe's"
    )
    parser.add_argument("--deepspeed_config", metavar="JSON", help="DeepSpeed JSON, by path or packaged name")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--launched_as", default="", help=argparse.SUPPRESS)  # a name from `dwt-ds launch`
    options = parser.parse_intermixed_args(arguments)
    # A crash inside a library then shows the Python stack; sys.stderr may not be a file.
    faulthandler.enable(file=2)
    stop = StopRequest(options.launched_as)
    stop.listen()
    quieten_libraries()
    from dwt_ds.engine.ranks import stop_ranks

    try:
        code = _assemble_and_train(options, stop)
    except Exception:
        traceback.print_exc()
        exit_alone(1)
    release_locks()
    stop_ranks()
    return code


def _assemble_and_train(options: argparse.Namespace, stop: StopRequest) -> int:
    """Returns the exit code if all ranks end here together; a rank that fails alone does not return."""
    from dwt_ds.engine.ranks import AllRanksError, OtherRankError, rank
    from dwt_ds.run.assemble import assemble
    from dwt_ds.run.exports import NotExportedError
    from dwt_ds.run.guard import TooManySkipsError

    try:
        session = assemble(options.recipe, options.overrides, options.deepspeed_config, stop)
    except OtherRankError:
        return 2
    except AllRanksError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 2
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        exit_alone(2)
    try:
        if session is not None:
            train(session)
    except OccupiedError as error:
        print(f"error: {error}", file=sys.stderr)
        exit_alone(2)
    except TooManySkipsError as error:
        if rank() == 0:  # raised on all
            print(f"error: {error}", file=sys.stderr, flush=True)
        return 3
    except NotExportedError as error:
        if rank() == 0:
            fix = "the same command repeats the export; `dwt-ds export` writes that of any checkpoint"
            print(f"error: NOT EXPORTED: {error}; {fix}", file=sys.stderr, flush=True)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
