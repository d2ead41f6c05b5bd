"""A frozen model's forward pass as CUDA graphs: one launch in place of one for each of its operations.

Source: NVIDIA CUDA C++ Programming Guide, section "CUDA Graphs"; torch's notes on CUDA semantics, "CUDA Graphs".
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar
from weakref import WeakSet

import torch
from torch import Tensor

from dwt_ds.base.words import one_line

# In the first calls with a shape torch compiles, chooses kernels and loads libraries, none of which can be recorded.
EAGER_CALLS = 3
# Each shape has buffers of its own. Rows with a varying number of labels could bring many shapes.
MOST_SHAPES = 4
# How far a replay may be from the same pass without a graph, as a share of the largest value. cuBLAS may choose other
# kernels for it; a graph that holds something else is off by far more.
_TOLERANCE = 0.02

_Shapes = tuple[torch.Size | None, ...]


Output = TypeVar("Output")


class NotRecordedError(RuntimeError):
    """A pass does what a graph cannot hold, such as reading a value.

    torch's allocator does not recover from that, so the process has to end.
    """


@dataclass(frozen=True)
class Recording(Generic[Output]):
    """A recorded pass."""

    graph: torch.cuda.CUDAGraph
    output: Output
    """What the pass computes, overwritten by each replay."""

    def replay(self) -> None:
        """Repeat the pass on what is in its inputs' buffers now."""
        self.graph.replay()


def use_a_stream_that_can_be_recorded() -> None:
    """Leave CUDA's default stream, which no graph can hold, for one of this process's own.

    For training passes, before any weight is used: autograd makes the stream of a weight's first use wait for its
    gradient.
    """
    torch.cuda.synchronize()
    torch.cuda.set_stream(torch.cuda.Stream())


def free_graph_memory_bytes() -> int:
    """Memory of recorded passes that holds nothing just now, in bytes; 0 where CUDA's own allocator is in use.

    torch does not count it as allocated, but only a replay can use it.
    """
    if torch.cuda.get_allocator_backend() != "native":  # cudaMallocAsync has no snapshots
        return 0
    pools = [each for each in torch.cuda.memory_snapshot() if each["segment_pool_id"] != (0, 0)]
    return sum(int(each["total_size"]) - int(each["allocated_size"]) for each in pools)


class CudaRecorder:
    """Records passes into one pool of memory, which is freed with the last recording.

    The outputs of a pass have to be read before another pass of the same recorder is replayed.
    """

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()
        self._graphs: WeakSet[torch.cuda.CUDAGraph] = WeakSet()
        """Those that are still in use."""

    def record(self, forward: Callable[[], Output]) -> Recording[Output]:
        """Record one call of `forward`, whose inputs have to stay where they are (NotRecordedError)."""
        if not self._graphs:
            # torch gives up a pool with its last graph, and refuses another one for it.
            self._pool = torch.cuda.graph_pool_handle()
        # cuBLAS keeps a workspace for each stream. It is cleared here, so that cuBLAS takes one from the pool. It is
        # cleared again below, so that this one goes back to the pool and does not outlive the graph.
        torch._C._cuda_clearCublasWorkspaces()
        graph, current = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        # The default stream cannot be recorded. For None torch takes one of its own.
        stream = None if current == torch.cuda.default_stream() else current
        try:
            # "thread_local": the loader's thread pins memory meanwhile, and NCCL's asks for its events.
            with torch.cuda.graph(graph, pool=self._pool, stream=stream, capture_error_mode="thread_local"):
                output = forward()
        except RuntimeError as error:
            raise NotRecordedError(
                f"train.cuda_graphs: a pass cannot be captured ({one_line(error)}); set it to off"
            ) from error
        torch._C._cuda_clearCublasWorkspaces()
        # From here on the pass's memory is counted by `free_graph_memory_bytes`.
        torch.cuda.reset_peak_memory_stats()
        self._graphs.add(graph)
        return Recording(graph, output)


class GraphedForward:
    """Calls a frozen model; a shape that comes `EAGER_CALLS` times in a row is recorded, and from then on replayed.

    Other shapes, such as that of an uneven last batch, run as they are. The first replay of a shape is compared with
    the pass itself, for which the host waits once.

    Args:
        forward: takes tensors, or None in place of one, all on one device, and returns one tensor. It must not read a
            value on the host, nor keep anything between calls.
    """

    def __init__(self, forward: Callable[..., Tensor], recorder: CudaRecorder) -> None:
        self._forward, self._recorder = forward, recorder
        self._graphs: dict[_Shapes, _Graph] = {}
        self._last: _Shapes = ()
        self._in_a_row = 0

    @torch.no_grad()
    def __call__(self, *inputs: Tensor | None) -> Tensor:
        """As `forward`; the result is the caller's own.

        Raises:
            NotRecordedError: the pass cannot be recorded.
            RuntimeError: its replay gives something else.
        """
        shapes = tuple(None if each is None else each.shape for each in inputs)
        self._in_a_row = self._in_a_row + 1 if shapes == self._last else 1
        self._last = shapes
        graph = self._graphs.get(shapes)
        if graph is None:
            output = self._forward(*inputs)
            worth_it = self._in_a_row == EAGER_CALLS and len(self._graphs) < MOST_SHAPES
            if worth_it and output.numel():
                self._graphs[shapes] = _Graph(self._forward, inputs, self._recorder)
            return output
        output = graph.replay(inputs)
        if not graph.is_checked:
            _check(output, self._forward(*inputs))
            graph.is_checked = True
        return output

    def release(self) -> None:
        """Drop the graphs and their buffers; emptying torch's cache then frees their memory."""
        self._graphs.clear()


class _Graph:
    """One shape's buffers and recording."""

    def __init__(
        self, forward: Callable[..., Tensor], inputs: tuple[Tensor | None, ...], recorder: CudaRecorder
    ) -> None:
        buffers = self._buffers = [None if each is None else each.clone() for each in inputs]
        self._recording = recorder.record(lambda: forward(*buffers))
        self.is_checked = False

    def replay(self, inputs: tuple[Tensor | None, ...]) -> Tensor:
        for buffer, each in zip(self._buffers, inputs):
            if buffer is not None and each is not None:
                buffer.copy_(each)
        self._recording.replay()
        # The next replay, of whichever shape, may write there.
        return self._recording.output.clone()


def _check(replayed: Tensor, exact: Tensor) -> None:
    largest = exact.float().abs().max().clamp(min=1e-6)
    off = float((replayed.float() - exact.float()).abs().max() / largest)
    if not off <= _TOLERANCE:
        raise RuntimeError(
            f"train.cuda_graphs: a replay of the teacher's forward pass is off by {off:.1e} of its largest "
            "value; set it to off"
        )
