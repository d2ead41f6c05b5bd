"""When a teacher's forward pass is recorded and replayed; on a CPU by a stand-in that repeats it, see test_gpu.py."""

from __future__ import annotations

import gc
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dwt_ds.data.batches import Batch
from dwt_ds.engine import cuda_graphs, teacher
from dwt_ds.engine.cuda_graphs import EAGER_CALLS, MOST_SHAPES, CudaRecorder, GraphedForward, NotRecordedError
from dwt_ds.engine.teacher import TeacherEngine
from dwt_ds.plan.simulation import launches_kernel
from dwt_ds.plan.speed import REPLAY_LAUNCHES

Inputs = tuple[Tensor, Tensor | None, Tensor]


def test_the_free_memory_of_graphs_is_asked_for_only_where_the_allocator_knows_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """cudaMallocAsync's snapshot is an error."""
    segments = [
        {"segment_pool_id": (0, 0), "total_size": 8, "allocated_size": 1},
        {"segment_pool_id": (0, 1), "total_size": 8, "allocated_size": 3},
    ]
    monkeypatch.setattr(torch.cuda, "memory_snapshot", lambda: segments)
    monkeypatch.setattr(torch.cuda, "get_allocator_backend", lambda: "native")
    assert cuda_graphs.free_graph_memory_bytes() == 5
    monkeypatch.setattr(torch.cuda, "memory_snapshot", lambda: pytest.fail("asked"))
    monkeypatch.setattr(torch.cuda, "get_allocator_backend", lambda: "cudaMallocAsync")
    assert cuda_graphs.free_graph_memory_bytes() == 0


class Repetition:
    """A recording that runs the pass again: on the same buffers, into the same output."""

    def __init__(self, forward: Callable[[], Tensor]) -> None:
        self._forward, self.output, self.replays = forward, forward(), 0

    def replay(self) -> None:
        self.replays += 1
        self.output.copy_(self._forward())


class Repeater:
    """Of CUDA graphs, what a CPU can do."""

    def __init__(self, kind: type[Repetition] = Repetition) -> None:
        self.kind, self.made = kind, []  # type: ignore[var-annotated]

    def record(self, forward: Callable[[], Tensor]) -> Repetition:
        self.made.append(self.kind(forward))
        return self.made[-1]

    @property
    def replays(self) -> list[int]:
        return [each.replays for each in self.made]


TABLE = torch.randn(50, 4, generator=torch.Generator().manual_seed(0))


def pass_of(input_ids: Tensor, mask: Tensor | None, positions: Tensor) -> Tensor:
    """(N, 4)."""
    tokens = TABLE[input_ids] if mask is None else TABLE[input_ids] * mask[..., None]
    return tokens.cumsum(1).flatten(0, 1)[positions]


def inputs(rows: int, labels: int, *, padded: bool = False, seed: int = 0) -> Inputs:
    draw = torch.Generator().manual_seed(seed)
    mask = (torch.rand(rows, 8, generator=draw) > 0.3).long() if padded else None
    ids = torch.randint(0, 50, (rows, 8), generator=draw)
    return ids, mask, torch.randint(0, rows * 8, (labels,), generator=draw)


def call(graphed: GraphedForward, times: int, rows: int = 4, labels: int = 6, *, padded: bool = False) -> None:
    """Calls with other values each time; every result is that of the pass."""
    for seed in range(times):
        given = inputs(rows, labels, padded=padded, seed=seed)
        assert torch.equal(graphed(*given), pass_of(*given))


def test_a_shape_is_recorded_after_some_calls_in_a_row_and_then_replayed() -> None:
    recorder = Repeater()
    graphed = GraphedForward(pass_of, recorder)
    call(graphed, EAGER_CALLS - 1)
    assert recorder.made == []
    call(graphed, 1)
    assert recorder.replays == [0]
    call(graphed, 5)
    assert recorder.replays == [5]


def test_an_uneven_last_batch_runs_as_it_is_and_the_others_are_replayed_again() -> None:
    recorder = Repeater()
    graphed = GraphedForward(pass_of, recorder)
    for _ in range(4):  # evaluations, each with a last batch of another size
        call(graphed, EAGER_CALLS)
        call(graphed, 1, rows=1, labels=2)
    assert recorder.replays == [3 * EAGER_CALLS]


def test_calls_of_two_shapes_in_turn_are_not_in_a_row() -> None:
    recorder = Repeater()
    graphed = GraphedForward(pass_of, recorder)
    for labels in (5, 6, 7) * EAGER_CALLS:
        call(graphed, 1, labels=labels)
    assert recorder.made == []


def test_padded_batches_are_a_shape_of_their_own_and_their_mask_is_copied() -> None:
    recorder = Repeater()
    graphed = GraphedForward(pass_of, recorder)
    call(graphed, EAGER_CALLS + 1)
    call(graphed, EAGER_CALLS + 2, padded=True)
    assert recorder.replays == [1, 2]


def test_not_more_shapes_are_recorded_than_allowed() -> None:
    recorder = Repeater()
    graphed = GraphedForward(pass_of, recorder)
    for labels in range(1, MOST_SHAPES + 3):
        call(graphed, EAGER_CALLS + 1, labels=labels)
    assert recorder.replays == [1] * MOST_SHAPES


def test_a_batch_without_positions_is_never_recorded() -> None:
    recorder = Repeater()
    call(GraphedForward(pass_of, recorder), EAGER_CALLS + 1, labels=0)
    assert recorder.made == []


def test_a_result_stays_when_the_next_one_is_computed() -> None:
    graphed = GraphedForward(pass_of, Repeater())
    call(graphed, EAGER_CALLS)
    results = [graphed(*inputs(4, 6, seed=seed)) for seed in range(10, 13)]
    for seed, result in zip(range(10, 13), results):
        assert torch.equal(result, pass_of(*inputs(4, 6, seed=seed)))


def test_the_callers_tensors_are_not_written_to() -> None:
    graphed = GraphedForward(pass_of, Repeater())
    given = [inputs(4, 6, padded=True, seed=seed) for seed in range(EAGER_CALLS + 2)]
    for each in given:
        graphed(*each)
    for seed, each in enumerate(given):
        assert all(map(torch.equal, each, inputs(4, 6, padded=True, seed=seed)))


def test_a_replay_that_computes_something_else_ends_the_run() -> None:
    class Stale(Repetition):
        """What a pass would leave whose input was not its buffer."""

        def replay(self) -> None:
            pass

    graphed = GraphedForward(pass_of, Repeater(Stale))
    call(graphed, EAGER_CALLS)
    with pytest.raises(RuntimeError, match=r"^train.cuda_graphs: a replay of .* is off by .*; set it to off$"):
        graphed(*inputs(4, 6, seed=9))


def test_only_the_first_replay_is_compared() -> None:
    calls = Counter[str]()

    def counted(*given: Any) -> Tensor:
        calls["forward"] += 1
        return pass_of(*given)

    class Silent(Repetition):
        def __init__(self, forward: Callable[[], Tensor]) -> None:
            super().__init__(lambda: forward())

        def replay(self) -> None:
            super().replay()
            calls["forward"] -= 1

    graphed = GraphedForward(counted, Repeater(Silent))
    for seed in range(EAGER_CALLS + 6):
        graphed(*inputs(4, 6, seed=seed))
    assert calls["forward"] == EAGER_CALLS + 2, "once to record, once to compare"


def test_released_graphs_are_gone() -> None:
    recorder = Repeater()
    graphed = GraphedForward(pass_of, recorder)
    call(graphed, EAGER_CALLS + 1)
    recording = weakref.ref(recorder.made.pop())
    graphed.release()
    gc.collect()
    assert recording() is None


class Operations(TorchDispatchMode):
    """Counts what would be a launch on a GPU."""

    count = 0

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += launches_kernel(operation)
        return operation(*args, **(kwargs or {}))


def test_a_replay_is_as_many_launches_as_a_plan_counts() -> None:
    class Launch(Repetition):
        def replay(self) -> None:
            pass

    graphed = GraphedForward(pass_of, Repeater(Launch))
    given = inputs(4, 6)
    for _ in range(EAGER_CALLS + 1):
        graphed(*given)
    with Operations() as operations:
        graphed(*given)
    assert operations.count + 1 == REPLAY_LAUNCHES


class TestOfATeacher:
    """Which teachers are recorded."""

    @pytest.fixture(autouse=True)
    def _without_deepspeed(self, monkeypatch: pytest.MonkeyPatch) -> None:

        monkeypatch.setattr(teacher, "inference_engine", lambda gathered, settings: gathered.eval())
        monkeypatch.setattr(teacher, "shard_over_ranks", lambda model, dtype: model)

    def made(self, path: Path, recorder: Repeater | None, **settings: Any) -> TeacherEngine:
        fixed: dict[str, Any] = {"dtype": "fp32", "kernel_inject": False, "device": torch.device("cpu"), "seq_len": 32}
        return TeacherEngine(str(path), **(fixed | settings), recorder=recorder)

    def batches(self, count: int) -> Iterator[Batch]:
        none = torch.zeros(0, dtype=torch.int64)
        for seed in range(count):
            draw = torch.Generator().manual_seed(seed)
            tokens = torch.randint(5, 90, (2, 16), generator=draw)
            positions = torch.randperm(32, generator=draw)[:5].sort().values
            yield Batch(tokens, None, positions, none, tokens.numel(), none)

    def test_hidden_states_are_those_without_and_a_release_frees_the_graphs(self, tiny_teacher: Path) -> None:
        recorder = Repeater()
        graphed, plain = self.made(tiny_teacher, recorder), self.made(tiny_teacher, None)
        for batch in self.batches(EAGER_CALLS + 3):
            assert torch.equal(graphed(batch).hidden, plain(batch).hidden)
        assert recorder.replays == [3]
        recording = weakref.ref(recorder.made.pop())
        graphed.release()
        assert recording() is None

    @pytest.mark.parametrize("why", ["sharded", "injected", "unknown family"])
    def test_others_run_as_they_are(self, why: str, tiny_teacher: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        if why == "unknown family":
            monkeypatch.setattr(teacher, "known_layers", lambda model: None)
        recorder = Repeater()
        made = self.made(tiny_teacher, recorder, sharded=why == "sharded")
        if why == "injected":
            monkeypatch.setattr(made, "_choose_engine", lambda: setattr(made, "injected", True) or made.gathered)
        for batch in self.batches(EAGER_CALLS + 1):
            made(batch)
        assert recorder.made == []


class TestOnADevice:
    """How torch is asked, by a torch.cuda that only notes it."""

    @pytest.fixture(autouse=True)
    def _cuda(self, monkeypatch: pytest.MonkeyPatch) -> None:
        asked: list[Any] = []
        self.asked, self.stream = asked, "default"
        pools = (f"pool {number}" for number in count(1))

        class Graph:
            def replay(self) -> None:
                asked.append("replay")

        @contextmanager
        def graph(cuda_graph: Any, **settings: Any) -> Iterator[None]:
            asked.append(settings)
            yield

        cuda = SimpleNamespace(
            graph_pool_handle=lambda: next(pools),
            CUDAGraph=Graph,
            graph=graph,
            current_stream=lambda: self.stream,
            default_stream=lambda: "default",
            reset_peak_memory_stats=lambda: asked.append("reset"),
        )
        monkeypatch.setattr(cuda_graphs.torch, "cuda", cuda)
        clear = "_cuda_clearCublasWorkspaces"
        monkeypatch.setattr(torch._C, clear, lambda: asked.append("clear"), raising=False)

    @pytest.mark.parametrize(("current", "used"), [("default", None), ("stream", "stream")])
    def test_all_recordings_share_a_pool_and_leave_other_threads_alone(self, current: str, used: str | None) -> None:
        self.stream = current
        recorder, output = CudaRecorder(), torch.ones(2)
        recordings = [recorder.record(lambda: output) for _ in range(2)]
        assert all(recording.output is output for recording in recordings)
        recordings[0].replay()
        (pool,) = {each["pool"] for each in self.asked if isinstance(each, dict)}
        capture = {"pool": pool, "stream": used, "capture_error_mode": "thread_local"}
        assert self.asked == ["clear", capture, "clear", "reset"] * 2 + ["replay"]

    def test_after_the_last_graph_is_dropped_the_next_has_another_pool(self) -> None:
        """torch asserts that a pool is in use before it records into it again."""
        recorder = CudaRecorder()
        for _ in range(2):
            kept = [recorder.record(lambda: torch.ones(2)) for _ in range(2)]
            kept.pop(0)
            kept.append(recorder.record(lambda: torch.ones(2)))
            kept.clear()
        pools = [each["pool"] for each in self.asked if isinstance(each, dict)]
        assert [pools.index(pool) for pool in pools] == [0, 0, 0, 3, 3, 3]

    def test_what_cannot_be_captured_says_which_setting_to_change(self) -> None:
        def reads() -> Tensor:
            raise RuntimeError("CUDA error: operation not permitted when stream is capturing")

        message = r"^train.cuda_graphs: .* cannot be captured \(CUDA error: operation not .*\); set it to off$"
        with pytest.raises(NotRecordedError, match=message):
            CudaRecorder().record(reads)
