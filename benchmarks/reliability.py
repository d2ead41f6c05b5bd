"""What reliability costs: the pause of a save, and the time until a dead rank has ended the run.

python benchmarks/reliability.py --text FILE.txt [--ranks 2]

Trains the paper's student (6 x 768, without its teacher, which is not saved) for a few steps under ZeRO-2 and reads the
pauses from the progress lines. Then it starts again, kills one rank with SIGKILL and measures the time until the
launcher has ended. Adds a row to results/reliability.csv.
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import subprocess
import tempfile
import time
from pathlib import Path

import psutil
import torch
from rows import RESULTS, append_row, processor

from dwt_ds.cli.main import main as dwt_ds
from dwt_ds.launch.local import Launch, on_this_machine


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--text", type=Path, required=True, help="text to train on, a few MB")
    parser.add_argument("--ranks", type=int, default=2)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        data = ["--text", str(options.text), "--train-tokenizer", "30522", "--out", str(folder / "data")]
        assert dwt_ds(["prepare", *data]) == 0
        settings = [f"data.dir={folder / 'data'}", f"output_dir={folder / 'run'}", "train.micro_batch_size=2"]
        settings += ["train.epochs=null", "train.checkpoint_every=2", "train.log_every=1", "train.eval_rows=4"]
        launch = on_this_machine({**os.environ, "RANKS": str(options.ranks)})
        command = launch.command("dwt_ds.pretrain", ["paper_alone", *settings, "train.max_steps=6"])
        saved = subprocess.run(command, env=launch.environment, capture_output=True, text=True)
        assert saved.returncode == 0, saved.stdout + saved.stderr
        pauses = [float(seconds) for seconds in re.findall(r"training waited ([0-9.]+) s", saved.stdout)]
        checkpoint = max((folder / "run" / "checkpoints").glob("step_*"))
        size = sum(file.stat().st_size for file in checkpoint.iterdir())
        seconds = seconds_to_notice(launch, [*settings, "train.max_steps=1000"], folder / "run")
    row = {
        "device": f"{processor()}, {os.cpu_count()} cores",
        "torch": torch.__version__,
        "ranks": options.ranks,
        "checkpoint_megabytes": round(size / 1e6),
        "save_pause_seconds": sorted(pauses)[len(pauses) // 2],
        "dead_rank_noticed_seconds": round(seconds, 1),
    }
    print(row)
    append_row(RESULTS / "reliability.csv", row)


def seconds_to_notice(launch: Launch, settings: list[str], run: Path) -> float:
    """From the death of a rank in training to the end of its launcher."""
    (run / "complete.json").unlink()
    lines = len((run / "metrics.jsonl").read_text().splitlines())
    command = launch.command("dwt_ds.pretrain", ["paper_alone", *settings])
    silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(command, env=launch.environment, **silent)
    while len((run / "metrics.jsonl").read_text().splitlines()) < lines + 2:
        assert process.poll() is None, "the run ended by itself"
        time.sleep(0.1)
    ranks = [p for p in psutil.Process(process.pid).children(recursive=True) if "--local_rank=1" in p.cmdline()]
    began = time.monotonic()
    ranks[0].send_signal(signal.SIGKILL)
    assert process.wait(timeout=600) != 0
    return time.monotonic() - began


if __name__ == "__main__":
    main()
