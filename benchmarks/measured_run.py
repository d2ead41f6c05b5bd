"""A rank of a real run that records its memory and its traffic; scaling.py and tests/plan start one for each rank.

python measured_run.py REPORT RECIPE [key=value ...]
"""

from __future__ import annotations

import gc
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from dwt_ds.base.quiet import quieten_libraries
from dwt_ds.plan.simulation import LiveBytes


def storage_bytes(tensors: Any) -> int:
    """Bytes of the storages behind the tensors in nested containers, each storage counted once."""
    storages = {}
    for tensor in tree_iter(tensors):
        if isinstance(tensor, torch.Tensor):
            storages[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
    return sum(storages.values())


class SentBytes(TorchDispatchMode):
    """Counts the bytes and calls of each kind of collective, whoever makes them."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            # The larger side of what is gathered or scattered.
            sizes = [tensor_bytes(each) for each in args if tensor_bytes(each)]
            name = func._schema.name.removeprefix("c10d::").strip("_")
            self.bytes[name] += max(sizes, default=0)
            self.calls[name] += 1
        return func(*args, **(kwargs or {}))


def tensor_bytes(value: Any) -> int:
    return sum(t.numel() * t.element_size() for t in tree_iter(value) if isinstance(t, torch.Tensor))


class MeasuredStudent:
    """DeepSpeed's engine, whose tensors are measured around each call."""

    def __init__(self, engine: Any, sent: SentBytes, live: LiveBytes) -> None:
        self._engine, self._sent, self._live = engine, sent, live
        self.report: dict[str, Any] = {"sent": [], "calls": [], "peak": []}
        self._sent_before: Counter[str] = Counter()
        self._calls_before: Counter[str] = Counter()
        optimizer = engine.optimizer
        if not hasattr(optimizer, "_release_ipg_buffers"):
            return  # only stages 1 and 2 allocate their bucket in each backward pass
        release = optimizer._release_ipg_buffers

        def measure_and_release() -> None:
            buffers = [bucket.buffer for bucket in optimizer.ipg_buckets.values()]
            self.report["buckets"] = max(self.report.get("buckets", 0), storage_bytes(buffers))
            release()

        optimizer._release_ipg_buffers = measure_and_release

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def __call__(self, *inputs: Any) -> Any:
        parameters = list(self._engine.module.parameters())
        kept: dict[int, torch.UntypedStorage] = {}  # kept, so that no address is used twice

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            # Looked up each time, since ZeRO-3 changes a parameter's storage when it gathers it.
            if all(storage._cdata != each.untyped_storage()._cdata for each in parameters):
                kept[storage._cdata] = storage
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = self._engine(*inputs)
        if self._engine.module.training:
            self.report["activations"] = sum(storage.nbytes() for storage in kept.values())
        return loss

    def backward(self, loss: torch.Tensor) -> None:
        self._engine.backward(loss)
        optimizer = self._engine.optimizer
        own = getattr(optimizer, "averaged_gradients", {})
        of_parameters = [p.grad for p in self._engine.module.parameters() if p.grad is not None]
        self.report["gradient_slices"] = tensor_bytes([*map(list, filter(None, own.values()))])
        stage_3 = getattr(optimizer, "grad_partitions_flat_buffer", None)
        self.report["gradients"] = storage_bytes([*map(list, filter(None, own.values())), of_parameters, stage_3])

    def step(self) -> None:
        last = self._engine.is_gradient_accumulation_boundary()
        self._engine.step()
        if not last:
            return
        optimizer = self._engine.optimizer
        masters = ("single_partition_of_fp32_groups", "fp32_partitioned_groups_flat", "fp32_groups_flat", "fp32_groups")
        inner = getattr(optimizer, "optimizer", optimizer)
        state = [t for each in inner.state.values() for t in each.values() if torch.is_tensor(t) and t.dim()]
        shards = [getattr(p, "ds_tensor", None) for p in self._engine.module.parameters()]
        self.report["weights"] = storage_bytes([list(self._engine.module.parameters()), shards])
        self.report["master"] = storage_bytes([getattr(optimizer, name, None) for name in masters])
        self.report["optimizer"] = storage_bytes(state)
        self.report["sent"].append(dict(self._sent.bytes - self._sent_before))
        self.report["calls"].append(dict(self._sent.calls - self._calls_before))
        self._sent_before, self._calls_before = self._sent.bytes.copy(), self._sent.calls.copy()
        self.report["peak"].append(self._live.peak)
        self._live.reset_peak()


def main(report: Path, recipe: str, overrides: list[str]) -> None:
    quieten_libraries()
    from dwt_ds.engine.ranks import rank, stop_ranks
    from dwt_ds.pretrain import train
    from dwt_ds.run.assemble import assemble
    from dwt_ds.run.stop import StopRequest

    run = assemble(recipe, overrides, None, StopRequest())
    assert run is not None
    gc.collect()
    # On the meta device DeepSpeed keeps the shapes of what it has flattened.
    existing = [each for each in gc.get_objects() if isinstance(each, torch.Tensor) and each.device.type != "meta"]
    live, sent = LiveBytes(existing), SentBytes()
    del existing
    student = MeasuredStudent(run.student, sent, live)
    run.student = student  # type: ignore[assignment]
    with live, sent:
        train(run)
    if run.teacher is not None:
        parameters = list(run.teacher.model.parameters())
        shards = [getattr(parameter, "ds_tensor", None) for parameter in parameters]
        student.report["teacher"] = storage_bytes([parameters, shards, list(run.teacher.head)])
    report.with_name(f"{report.name}.{rank()}").write_text(json.dumps(student.report))
    stop_ranks()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3:])
