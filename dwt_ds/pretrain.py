"""Pre-train a student, with a weak teacher's help or alone; what the `deepspeed` launcher runs.

deepspeed --num_gpus 2 --module dwt_ds.pretrain quickstart train.max_steps=100
"""

from __future__ import annotations

import argparse
import faulthandler
import sys
from typing import TYPE_CHECKING

from dwt_ds.quiet import quieten_libraries
from dwt_ds.stop import StopRequest

if TYPE_CHECKING:
    from dwt_ds.run import Run


def train(run: Run) -> None:
    """The loop: a step is `gradient_accumulation_steps` micro-batches on every rank."""
    for step in run.steps():
        run.begin_step(step)
        micro_batches = run.next_micro_batches()
        scale = run.scale_for(step, micro_batches)
        for batch in micro_batches:
            batch = batch.to(run.device)
            view = run.teacher(batch) if run.teacher else None
            loss = run.student(batch, view, scale)
            run.student.backward(run.count(loss))
            run.student.step()
        run.end_step(step)
    run.finish()


def main(arguments: list[str] | None = None) -> int:
    """Parse, assemble, train. Exit code 0 when the run is complete, 2 for a user's mistake."""
    parser = argparse.ArgumentParser(prog="dwt_ds.pretrain", description=__doc__)
    parser.add_argument("recipe", help="path of a recipe, or the name of a packaged one")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="dotted settings that replace the recipe's")
    parser.add_argument("--deepspeed_config", metavar="JSON", help="DeepSpeed JSON, by path or packaged name")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    options = parser.parse_intermixed_args(arguments)
    faulthandler.enable()  # a crash inside of a library says which line of Python led there
    stop = StopRequest()
    stop.listen()
    quieten_libraries()
    from dwt_ds.assemble import assemble
    from dwt_ds.engine.ranks import OtherRankError, stop_ranks
    from dwt_ds.guard import TooManySkipsError

    try:
        run = assemble(options.recipe, options.overrides, options.deepspeed_config, stop)
        if run is not None:
            train(run)
    except OtherRankError:
        return 2
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 2
    except TooManySkipsError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 3
    finally:
        stop_ranks()
    return 0


if __name__ == "__main__":
    sys.exit(main())
