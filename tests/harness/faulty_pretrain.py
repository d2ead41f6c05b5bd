"""dwt_ds.pretrain with a fault in it, for the tests of what a run survives; run as a module by the launcher.

FAULT="kill STAGE WHO STEP"     SIGKILL at a stage of the save of step STEP: before, shards, manifest, pointer
FAULT="evaluation WHO STEP"     SIGKILL where the evaluation after step STEP begins
FAULT="signal NUMBER PLACE WHO" a signal to itself and its loader: start, training (at step 5), validation
FAULT="inf WHO STEP..."         the loss of these steps is infinite
FAULT="spike WHO STEP..."       the loss of these steps is 100 times what it is
FAULT="full WHO STEP"           the disk is full at the save of step STEP
FAULT="gone WHO STEP"           the file system of the checkpoints is gone at the save of step STEP
FAULT="undeleted"               the folder of the checkpoints cannot be listed where old ones are deleted
FAULT="hang WHO STEP"           it sleeps for 16 seconds at the start of step STEP
WHO is a rank or "all".
"""

from __future__ import annotations

import errno
import io
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

RANK = os.environ.get("RANK", "0")


def hit(who: str) -> bool:
    return who in ("all", RANK)


def die() -> None:
    sys.stdout.flush()
    os.kill(os.getpid(), signal.SIGKILL)


def kill_in_save(stage: str, who: str, step: str) -> None:
    from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine

    from dwt_ds.engine.checkpoint import save_and_load as checkpoint

    name = f"step_{int(step):08d}"
    parts = {"number": 0}
    run_on_all_ranks = checkpoint._on_all_ranks

    def together(work: Callable[[], None]) -> None:
        parts["number"] += 1
        if stage == "before" and parts["number"] == 1 and hit(who):
            die()
        if parts["number"] == 4 and RANK != "0" and hit(who) and stage in ("manifest", "pointer"):
            # Rank 0 alone works now; this one dies when it has come to the stage.
            while not (stage == "pointer" and (Path(os.environ["CHECKPOINTS"]) / name).is_dir()) and stage == "pointer":
                time.sleep(0.01)
            die()
        run_on_all_ranks(work)

    def save_half(self: Any, state_dict: Any, path: str) -> None:
        whole = io.BytesIO()
        torch.save(state_dict, whole)
        Path(path).write_bytes(whole.getvalue()[: whole.tell() // 2])
        if "optim" in path:
            die()

    def save(engine: Any, folder: Path, state: Any, *others: Any) -> float:
        if state.step == int(step):
            os.environ["CHECKPOINTS"] = str(folder)
            checkpoint._on_all_ranks = together
            if stage == "shards" and hit(who):
                TorchCheckpointEngine.save = save_half
            if stage == "manifest" and RANK == "0" and hit(who):
                checkpoint.write_manifest = lambda *_: die()
            if stage == "pointer" and RANK == "0":
                checkpoint.point_to = lambda *_: die() if hit(who) else time.sleep(3)
        return plain_save(engine, folder, state, *others)

    from dwt_ds.run import session

    plain_save = session.save_checkpoint
    session.save_checkpoint = save


def kill_in_evaluation(who: str, step: str) -> None:
    from dwt_ds.run.session import Session

    plain = Session._evaluate

    def evaluate(self: Session, done: int) -> None:
        if done == int(step) and hit(who):
            die()
        plain(self, done)

    Session._evaluate = evaluate


def signal_itself(number: str, place: str, who: str) -> None:
    from dwt_ds.run import session
    from dwt_ds.run.session import Session

    def send() -> None:
        if hit(who):
            loader = [str(child.pid) for child in multiprocessing.active_children()]
            subprocess.run(["kill", f"-{number.removeprefix('SIG')}", *loader, str(os.getpid())], check=True)

    if place == "start":
        plain_init = Session.__init__

        def init(self: Session, **parts: Any) -> None:
            send()
            plain_init(self, **parts)

        Session.__init__ = init
    if place == "training":
        plain_begin = Session.begin_step

        def begin_step(self: Session, step: int, *arguments: Any) -> Any:
            if step == self.first_step + 5:
                send()
            return plain_begin(self, step, *arguments)

        Session.begin_step = begin_step
    if place == "validation":
        session._BATCHES_BETWEEN_STOP_CHECKS = 1
        plain_until = Session._until_stopped

        def until_stopped(self: Session, batches: Iterator[Any]) -> Iterator[Any]:
            for number, batch in enumerate(plain_until(self, batches)):
                if number == 1 and self._done > self.first_step + 1:
                    send()
                yield batch

        Session._until_stopped = until_stopped


def change_loss(who: str, steps: list[str], factor: float) -> None:
    from dwt_ds.distill.objective import DistillObjective
    from dwt_ds.run.session import Session

    now = {"step": -1}
    plain_begin, plain_forward = Session.begin_step, DistillObjective.forward

    def begin_step(self: Session, step: int, *arguments: Any) -> Any:
        now["step"] = step + 1
        return plain_begin(self, step, *arguments)

    def forward(self: DistillObjective, *arguments: Any) -> Any:
        loss = plain_forward(self, *arguments)
        if self.training and str(now["step"]) in steps and hit(who):
            if factor == float("inf"):
                # Its gradient is finite: only a look at the loss itself tells.
                return loss._replace(loss=loss.loss + factor)
            return loss._replace(loss=loss.loss * factor, hard=loss.hard * factor)
        return loss

    Session.begin_step = begin_step
    DistillObjective.forward = forward


def hang(who: str, step: str) -> None:
    from dwt_ds.run.session import Session

    plain = Session.begin_step

    def begin_step(self: Session, next_step: int, *arguments: Any) -> Any:
        if next_step + 1 == int(step) and hit(who):
            time.sleep(16)
        return plain(self, next_step, *arguments)

    Session.begin_step = begin_step


def io_error(*_arguments: Any) -> Any:
    raise OSError(errno.EIO, os.strerror(errno.EIO))


def lose_disk(kind: str, who: str, step: str) -> None:
    from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine

    plain = TorchCheckpointEngine.save

    def save(self: Any, state_dict: Any, path: str) -> None:
        if f"step_{int(step):08d}" in path and hit(who):
            if kind == "gone":
                shutil.disk_usage = io_error
                io_error()
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        plain(self, state_dict, path)

    TorchCheckpointEngine.save = save


if __name__ == "__main__":
    from dwt_ds.pretrain import main

    kind, *values = os.environ.get("FAULT", "none").split()
    if kind == "kill":
        kill_in_save(*values)
    elif kind == "evaluation":
        kill_in_evaluation(*values)
    elif kind == "signal":
        signal_itself(*values)
    elif kind in ("inf", "spike"):
        change_loss(values[0], values[1:], float("inf") if kind == "inf" else 100.0)
    elif kind == "hang":
        hang(*values)
    elif kind in ("full", "gone"):
        lose_disk(kind, *values)
    elif kind == "undeleted":
        from dwt_ds.engine.checkpoint import save_and_load

        save_and_load._delete_old = io_error
    sys.exit(main())
