"""A table of one recipe at several micro-batches, measured in one process: the second form of training_speed.py."""

from __future__ import annotations

import gc
from concurrent.futures import Future, ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch
from eager_loop import MICRO_BATCH, EagerLoop
from rows import Row, Table, matches, processor_and_cores
from step_speed import planned_peak_mib, time_steps
from transformers import BertConfig

from dwt_ds.base.quiet import quieten_libraries
from dwt_ds.base.software import OUR_PACKAGES, source_hash
from dwt_ds.engine.cuda_graphs import NotRecordedError
from dwt_ds.engine.ranks import device, start_ranks, stop_ranks
from dwt_ds.run.mfu import matrix_rate

RECIPE = "paper_weak_h100"
FIGURES = (
    "optimizer",
    "matrix_tflops",
    "steps",
    "tokens_per_second",
    "ms_per_step",
    "mfu",
    "mfu_student",
    "share_of_matrix_rate",
    "launches_per_step",
    "device_operations_per_step",
    "device_busy_share",
    "peak_mib",
    "planned_peak_mib",
    "error",
)


def measure_micro_batches(
    path: Path,
    *,
    data: Path,
    teacher: Path,
    student: BertConfig,
    overrides: list[str],
    micro_batches: list[int],
    modes: list[tuple[str, str]],
    steps: int,
    seconds: float,
    loop_steps: int,
) -> bool:
    """Add a row to the file at `path` for each micro-batch and mode, and for the loop if it has steps.

    A mode is the values of train.compile and train.cuda_graphs. Returns whether all have figures.
    """
    quieten_libraries()
    start_ranks()
    table, rate = Table(path, FIGURES), matrix_rate(device(), torch.bfloat16)
    measured_rate = {"matrix_tflops": round(rate / 1e12, 3)}
    # Part of each row's key: a repetition on another machine, or of other code, measures anew.
    here = {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else processor_and_cores(),
        "versions": f"torch {torch.__version__}",
        "code": " ".join(map(source_hash, OUR_PACKAGES)),
    }
    common = [*overrides, f"data.dir={data}", f"teacher.path={teacher}"]
    loop_key = {"provider": "loop", "compile": "off", "cuda_graphs": "off", "micro_batch": MICRO_BATCH} | here
    if loop_steps and not table.has(loop_key):
        loop = EagerLoop(data, teacher, student)
        table.add(loop_key, lambda: measured_rate | {"tokens_per_second": round(loop.tokens_per_second(loop_steps), 1)})
        del loop

    def measure(settings: list[str], name: str) -> Row:
        trace = path.parent / "traces" / f"{name}.json.gz"
        figures = time_steps(RECIPE, settings, steps=steps, seconds=seconds, trace=trace)
        return figures | measured_rate | {"share_of_matrix_rate": round(figures["flops_per_second"] / rate, 4)}

    keys = [
        {"provider": "dwt_ds", "compile": compiled, "cuda_graphs": graphs, "micro_batch": micro_batch} | here
        for compiled, graphs in modes
        for micro_batch in micro_batches
    ]
    # A pass that cannot be recorded ends the process: what needs no graphs comes first, what failed before comes last.
    keys.sort(key=lambda key: (key["cuda_graphs"] != "off", table.failed(key)))
    # Beside the measurement, in another process: a stage that is cut short has the plan's peaks of what it measured.
    with ProcessPoolExecutor(1, get_context("spawn")) as planner:
        planned: dict[tuple[int, str], Future[int]] = {}
        for key in keys:
            size, graphs = key["micro_batch"], key["cuda_graphs"]
            settings = [*common, f"train.micro_batch_size={size}", f"train.cuda_graphs={graphs}"]
            if (size, graphs) not in planned:
                planned[size, graphs] = planner.submit(planned_peak_mib, RECIPE, settings)
            if not table.has(key):
                words = [*settings, f"train.eval_rows={size}", f"train.compile={key['compile']}"]
                name = f"{size}_rows_compile_{key['compile']}_graphs_{graphs}"
                failed = table.add(key, lambda words=words, name=name: measure(words, name))  # type: ignore[misc]
                if isinstance(failed, NotRecordedError):
                    print("the rest needs another process: start the same command again", flush=True)
                    break
            _fill_in(table, here, {what: peak for what, peak in planned.items() if peak.done()})
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        _fill_in(table, here, planned)
    stop_ranks()
    wanted = [loop_key, *keys] if loop_steps else keys
    return all(table.has(key) for key in wanted)


def _fill_in(table: Table, here: Row, planned: dict[tuple[int, str], Future[int]]) -> None:
    """The peaks of the plan, by micro-batch and train.cuda_graphs, in the rows of this device and code."""
    for row in table.rows:
        key = int(row["micro_batch"]), row["cuda_graphs"]
        if matches(row, here | {"provider": "dwt_ds"}) and key in planned:
            row["planned_peak_mib"] = planned[key].result()
    table.write()
