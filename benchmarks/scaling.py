"""How training scales: measured on this machine's cores, and on paper for machines full of GPUs.

    python benchmarks/scaling.py measure [--data data/quickstart] [--ranks 1,2,4] [--steps 12]
    python benchmarks/scaling.py paper

`measure` trains the recipe quickstart's student with an untrained teacher on 1, 2 and 4 gloo ranks of one thread each,
with the same micro-batch on each (weak scaling). It records seconds per step, bytes per rank of weights, fp32 master
weights, optimizer state and gradients, and bytes of the collectives, next to the predictions of `dwt-ds plan`. `paper`
is `dwt-ds plan` for 8, 64 and 512 GPUs with one setting changed at a time. Results go to benchmarks/results/scaling.csv
and scaling_paper.csv; both draw docs/figures/scaling.png from these files.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from rows import RESULTS, processor, read_rows, write_rows

from dwt_ds.base.ports import reserve_port
from dwt_ds.run.folder import RunFolder

MEASURED, PAPER = RESULTS / "scaling.csv", RESULTS / "scaling_paper.csv"
FIGURE = Path(__file__).parent.parent / "docs" / "figures" / "scaling.png"
WORKER = Path(__file__).with_name("measured_run.py")

GPUS = (8, 64, 512)
ZERO = "deepspeed.zero_optimization"
ZERO_3 = [f"{ZERO}.stage=3", f"{ZERO}.overlap_comm=false"]
RELEASED = [*ZERO_3, f"{ZERO}.stage3_max_reuse_distance=0", f"{ZERO}.stage3_prefetch_bucket_size=0"]
# Name -> overrides; the first is the recipe as it is.
SETTINGS: dict[str, list[str]] = {
    "ZeRO-2": [],
    "ZeRO-2, overlap": [f"{ZERO}.overlap_comm=true"],
    "ZeRO-2, overlap, 8 buckets": [f"{ZERO}.overlap_comm=true", f"{ZERO}.reduce_bucket_size={{bucket}}"],
    "ZeRO-2, reduce to owner": [f"{ZERO}.use_multi_rank_bucket_allreduce=false"],
    "ZeRO-2, 4 accumulated": ["train.gradient_accumulation_steps=4"],
    "ZeRO-1, 4 accumulated": [f"{ZERO}.stage=1", "train.gradient_accumulation_steps=4"],
    "ZeRO-2, 4 x micro-batch": ["train.micro_batch_size={larger}"],
    "ZeRO-3": ZERO_3,
    "ZeRO-3, weights released": RELEASED,
    "ZeRO-3, weights released, hpZ 8": [*RELEASED, f"{ZERO}.zero_hpz_partition_size=8"],
}
RECIPES = {"paper_weak": 16, "large": 64}
"""Recipe -> its micro-batch."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("measure", "paper"))
    parser.add_argument("--data", default="data/quickstart", help="prepared data folder for measuring")
    parser.add_argument("--ranks", default="1,2,4")
    parser.add_argument("--steps", type=int, default=12)
    options = parser.parse_args()
    if options.steps < 3:
        parser.error(f"--steps {options.steps}: must be at least 3, since the first and the last are not used")
    if options.part == "measure":
        ranks = [int(number) for number in options.ranks.split(",")]
        write_rows(MEASURED, [_measure(number, options) for number in ranks])
    else:
        write_rows(PAPER, _on_paper())
    _draw()
    return 0


def _measure(ranks: int, options: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        overrides = [
            f"data.dir={options.data}",
            f"teacher.path={_random_teacher(options.data, folder / 'teacher')}",
            f"output_dir={folder / 'run'}",
            f"train.max_steps={options.steps}",
            # No step in between is logged: a logged step also sums its losses over the ranks.
            f"train.log_every={options.steps + 1}",
            "train.eval_rows=16",
            "train.eval_every=0",
            "train.checkpoint_every=0",
        ]
        reports = _run_ranks(ranks, folder, overrides)
        metrics = RunFolder(folder / "run").metrics_rows()
    first, last = (row for row in metrics if "loss" in row)
    seconds = last["elapsed_seconds"] - first["elapsed_seconds"]
    row: dict[str, Any] = {
        "device": processor(),
        "cores": len(os.sched_getaffinity(0)),
        "ranks": ranks,
        "seconds_per_step": round(seconds / (last["step"] - first["step"]), 4),
        "tokens_per_second": round(last["tokens_per_second"], 1),
    }
    for part in ("weights", "master", "optimizer", "gradient_slices", "gradients", "activations", "teacher"):
        row[f"{part}_bytes"] = max(report[part] for report in reports)
    row["peak_bytes"] = max(report["peak"][-1] for report in reports)
    row["all_reduce_bytes"] = reports[0]["sent"][-1].get("allreduce", 0) if ranks > 1 else 0
    row["all_gather_bytes"] = reports[0]["sent"][-1].get("allgather_base", 0) if ranks > 1 else 0
    return {**row, **_predicted(ranks, overrides)}


def _run_ranks(ranks: int, folder: Path, overrides: list[str]) -> list[dict[str, Any]]:
    common = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "WORLD_SIZE": str(ranks), "LOCAL_SIZE": str(ranks)}
    common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(reserve_port())}
    command = [sys.executable, str(WORKER), str(folder / "report"), "quickstart", *overrides]
    processes = [
        subprocess.Popen(command, env={**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(ranks)
    ]
    if any(process.wait() for process in processes):
        raise RuntimeError(f"{ranks} ranks: one failed; its output is above")
    return [json.loads((folder / f"report.{rank}").read_text()) for rank in range(ranks)]


def _random_teacher(data: str, folder: Path) -> Path:
    """A teacher of the quickstart's shape; its training would change no figure here."""
    from transformers import AutoTokenizer

    from dwt_ds.config.recipe import load_recipe
    from dwt_ds.data.manifest import read_data_manifest
    from dwt_ds.models.build import build_student

    manifest = read_data_manifest(Path(data))
    shape = load_recipe("quickstart_teacher").config.student
    pad = int(manifest.settings["pad_id"])
    build_student(shape, vocab_size=manifest.vocab_size, seq_len=manifest.seq_len, pad_token_id=pad).save_pretrained(
        folder
    )
    AutoTokenizer.from_pretrained(Path(data) / "tokenizer").save_pretrained(folder)
    return folder


def _plan(recipe: str, overrides: list[str], gpus: int, gpu: str) -> Any:
    from dwt_ds.plan.hardware import find_device
    from dwt_ds.plan.plan import Plan
    from dwt_ds.plan.settings import resolve_plan
    from dwt_ds.plan.shapes import build_shapes

    settings = resolve_plan(recipe, overrides, None, gpus)
    nodes = 1 if gpu == "cpu" else gpus // 8
    device = find_device(gpu, gpus // nodes)
    return Plan(settings, build_shapes(settings), device, nodes=nodes)


def _predicted(ranks: int, overrides: list[str]) -> dict[str, Any]:
    plan = _plan("quickstart", overrides, ranks, "cpu")
    memory = plan.memory(plan.stage)
    parts = memory.moments["optimizer step"]
    traffic = {
        kind: sum(t.bytes for t in plan.traffic(plan.stage) if t.collective == kind)
        for kind in ("all_reduce", "all_gather")
    }
    return {
        "predicted_optimizer_bytes": parts["optimizer state"],
        "predicted_gradients_bytes": parts["gradients"],
        "predicted_peak_bytes": memory.peak,
        "predicted_all_reduce_bytes": traffic["all_reduce"],
        "predicted_all_gather_bytes": traffic["all_gather"],
    }


def _on_paper() -> list[dict[str, Any]]:
    from dwt_ds.base.quiet import quieten_libraries

    quieten_libraries()
    rows = []
    for recipe, micro_batch in RECIPES.items():
        elements = sum(_plan(recipe, [], 8, "h100").shapes.trainable_numels)
        for name, overrides in SETTINGS.items():
            words = {"bucket": elements // 8, "larger": 4 * micro_batch}
            filled = [override.format(**words) for override in overrides]
            for gpus in GPUS:
                rows.append(
                    {"recipe": recipe, "gpus": gpus, "setting": name, **_figures(_plan(recipe, filled, gpus, "h100"))}
                )
                print(rows[-1], flush=True)
    return rows


def _figures(plan: Any) -> dict[str, Any]:
    time = plan.step_time(plan.stage)
    return {
        "rows_per_step": plan.settings.rows_per_step,
        "compute_ms": round(1e3 * time.compute, 3),
        "host_ms": round(1e3 * time.host, 3),
        "traffic_ms": round(1e3 * time.traffic, 3),
        "exposed_ms": round(1e3 * time.exposed, 3),
        "efficiency": round(time.efficiency, 3),
        "memory_gib": round(plan.memory(plan.stage).peak / 2**30, 2),
        "million_tokens_per_second": round(
            plan.settings.rows_per_step * plan.settings.corpus.tokens_per_row / time.total / 1e6, 2
        ),
    }


def _draw() -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, *right) = pyplot.subplots(1, 3, figsize=(10, 3.4), layout="constrained")
    measured = read_rows(MEASURED)
    ranks = [int(row["ranks"]) for row in measured]
    for key, label, marker in (
        ("optimizer_bytes", "optimizer state", "o"),
        ("gradient_slices_bytes", "gradients, own part", "s"),
        ("gradients_bytes", "gradients, their buffer", "^"),
    ):
        if measured and key in measured[0]:
            left.plot(ranks, [int(row[key]) / 1e6 for row in measured], marker=marker, label=label)
    if measured:
        first = int(measured[0]["optimizer_bytes"]) * ranks[0] / 1e6
        left.plot(ranks, [first / number for number in ranks], "k:", label="1 / N")
    left.set(title="measured, ZeRO-2, per rank", xlabel="gloo ranks", ylabel="MB", xticks=ranks, ylim=(0, None))
    left.legend(fontsize=7)
    paper = read_rows(PAPER)
    for axes, recipe in zip(right, RECIPES):
        for name in SETTINGS:
            rows = [row for row in paper if row["recipe"] == recipe and row["setting"] == name]
            axes.plot(
                [int(row["gpus"]) for row in rows],
                [100 * float(row["efficiency"]) for row in rows],
                marker=".",
                label=name,
            )
        axes.set(
            title=f"on paper, {recipe}", xscale="log", xlabel="H100 GPUs", ylabel="scaling efficiency, %", ylim=(0, 100)
        )
        axes.set_xticks(GPUS, [str(number) for number in GPUS])
    right[-1].legend(fontsize=5.5, loc="lower left")
    FIGURE.parent.mkdir(exist_ok=True)
    figure.savefig(FIGURE, dpi=90)


if __name__ == "__main__":
    sys.exit(main())
