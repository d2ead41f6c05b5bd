"""The linear form's parts called directly: on a CPU the public function leaves ignored rows out before they see one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from dwt_kernels import linear_chunked, linear_distill_loss
from dwt_kernels.arguments import Objective, backend_module
from dwt_kernels.layout import Labels
from dwt_kernels.linear_chunked import (
    Head,
    add_product,
    chunked_statistics_and_gradients,
    column_parts,
    logits_buffer,
    write_hidden_gradient,
    write_logits,
)
from dwt_kernels.on_torch import blocks
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

# A GPU, or what stands for one where tensors need no values.
GPU = "cuda" if torch.cuda.is_available() else "meta"
sums_on_gpu = pytest.mark.skipif(
    GPU == "meta" and torch.__version__ < "2.13", reason="before torch 2.13, meta has no addmm with out_dtype"
)


def chunked_gradients(
    student: Head, teacher: Head | None, labels: Tensor, objective: Objective, chunk_rows: int = 3
) -> list[Tensor]:
    """d hidden, d weight and d bias, no row left out."""
    scalars = backend_module(objective.backend).prepare(labels, student.weight.shape[0], objective)
    upstream = torch.ones((), device=labels.device)
    inputs = (student, teacher, Labels(labels, objective.ignore_index, False), upstream, scalars)
    _, *gradients = chunked_statistics_and_gradients(*inputs, [True] * 3, chunk_rows, objective.backend)
    return gradients


@pytest.mark.parametrize("hard_only", [False, True])
def test_poisoned_rows_that_do_not_count_reach_no_gradient(backend, device, make_objective, hard_only):
    """On a GPU nobody knows which rows count before the products: an ignored row's zeros meet its NaN in dW."""
    generator = torch.Generator().manual_seed(0)
    rows, columns = 8, 50

    def head(width: int) -> Head:
        shapes = ((rows, width), (columns, width), (columns,))
        return Head(*(torch.randn(shape, generator=generator).to(device) for shape in shapes))

    student, teacher = head(6), None if hard_only else head(4)
    labels = torch.arange(rows, device=device)
    labels[[1, 6]] = -100
    objective = make_objective(temperature=2.0, normalizer=5, backend=backend)
    expected = chunked_gradients(student, teacher, labels, objective)
    student.hidden[1], student.hidden[6] = float("nan"), float("inf")
    if teacher is not None:
        teacher.hidden[1] = float("nan")
    poisoned = chunked_gradients(student, teacher, labels, objective)
    torch.testing.assert_close(poisoned, expected)
    assert not poisoned[0][1].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_nothing_is_read_before_it_is_written(backend, device, make_objective, dtype):
    """New memory holds NaN here. Products of a CPU with AMX read what lies beside a row of 16 bits."""
    heads = [
        Head(*(torch.randn(shape, device=device).to(dtype) for shape in ((60, width), (997, width), (997,))))
        for width in (40, 72)
    ]
    labels = torch.arange(60, device=device)
    objective = make_objective(temperature=2.0, normalizer=60, backend=backend)
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        gradients = chunked_gradients(heads[0], heads[1], labels, objective, chunk_rows=24)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize("device_type", ["cpu", "meta"])
@pytest.mark.parametrize("shape", [(300_000, 300), (100_000_000,), (2, 100_000_000)])
def test_fp32_temporaries_are_bounded(device_type, shape):
    """ "meta" stands for a GPU: everything that is not a CPU's."""
    tensor = torch.empty((), dtype=torch.bfloat16, device=device_type).expand(shape)
    found = blocks.blocks(tensor)
    assert sum(block.shape[0] for block in found) == shape[0]
    most = blocks.CPU_BLOCK_ELEMENTS if device_type == "cpu" else blocks.GPU_BLOCK_ELEMENTS
    assert most * 4 <= 64 << 20
    assert max(block.numel() for block in found) <= max(most, tensor[0].numel())


@sums_on_gpu
@pytest.mark.parametrize(
    ("dtype", "chunks", "expected"),
    [
        (torch.bfloat16, 1, torch.bfloat16),
        (torch.bfloat16, 2, torch.float32),
        (torch.float16, 1, torch.float32),  # a sum over many rows may be beyond its range
        (torch.float32, 1, torch.float32),
    ],
    ids=str,
)
def test_dw_of_one_chunk_is_in_the_dtype_it_waits_in(dtype, chunks, expected):
    """There a product may leave fp32."""
    left, right = torch.empty(50, 8, dtype=dtype, device=GPU), torch.empty(8, 6, dtype=dtype, device=GPU)
    total = None
    for chunk in range(chunks):
        total = add_product(total, left, right, last=chunk == chunks - 1)
    assert total is not None
    assert total.dtype == expected


@pytest.mark.parametrize("chunk_rows", [None, 2000])
def test_fp16_sums_over_more_rows_than_it_has_range_for(monkeypatch, device, chunk_rows):
    """4,096 rows of nearly 1 x 50 before they are divided by their number; a chunk of 1,408 is too many already."""
    monkeypatch.setattr(blocks, "CPU_BLOCK_ELEMENTS", 1 << 9)
    monkeypatch.setattr(blocks, "PRODUCT_ROWS", 30)
    rows, columns, width = 4096, 100, 8
    hidden = torch.full((rows, width), 50.0, device=device)
    weight = torch.randn(columns, width, generator=torch.Generator().manual_seed(0)).mul_(0.01).to(device)
    labels = torch.zeros(rows, dtype=torch.int64, device=device)
    gradients = {}
    for dtype in (torch.float16, torch.float32):
        head = [each.to(dtype).requires_grad_() for each in (weight, torch.zeros(columns, device=device))]
        keywords = {"backend": "torch", "memory": "chunked", "chunk_rows": chunk_rows}
        loss = linear_distill_loss(hidden.to(dtype), *head, None, None, None, labels, **keywords).loss
        gradients[dtype] = [each.float() for each in torch.autograd.grad(loss, head)]
    torch.testing.assert_close(gradients[torch.float16], gradients[torch.float32], rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize(
    ("device_type", "dtype", "columns", "expected"),
    [
        ("cuda", torch.bfloat16, 30522, [30520, 2]),
        ("cuda", torch.float16, 50265, [50264, 1]),
        ("cuda", torch.bfloat16, 128256, [128256]),
        ("cuda", torch.bfloat16, 1000 + 7, [1007]),  # the few columns' rounding would show
        ("cuda", torch.float32, 30522, [30522]),
        ("cpu", torch.bfloat16, 30522, [30522]),
    ],
    ids=str,
)
def test_columns_beyond_a_multiple_of_8_are_a_product_of_their_own(device_type, dtype, columns, expected):
    with FakeTensorMode():
        parts = column_parts(columns, torch.empty(columns, 4, dtype=dtype, device=device_type))
    assert [part.stop - part.start for part in parts] == expected
    assert [part.start for part in parts] == [0, *(part.stop for part in parts[:-1])]


def whole_numbers(*shape: int, dtype: torch.dtype, device: str) -> Tensor:
    """-1, 0 and 1, whose sums are exact in 16 bits."""
    return torch.randint(-1, 2, shape, generator=torch.Generator().manual_seed(sum(shape))).to(device, dtype)


@pytest.mark.parametrize("columns", [16, 17, 23])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_two_products_are_the_same_as_one(monkeypatch, device, dtype, columns):
    monkeypatch.setattr(linear_chunked, "wants_aligned_columns", lambda operand: True)
    monkeypatch.setattr(linear_chunked, "LEAST_SPLIT_COLUMNS", 1)
    hidden, weight = (whole_numbers(size, 8, dtype=dtype, device=device) for size in (5, columns))
    buffer = logits_buffer(Head(hidden, weight, None), 5, "triton")
    assert buffer.stride(0) % linear_chunked.COLUMN_ALIGNMENT == 0
    assert torch.equal(write_logits(hidden, weight, buffer), hidden @ weight.t())
    buffer.copy_(whole_numbers(5, columns, dtype=dtype, device=device))
    d_hidden = torch.full_like(hidden, float("nan"))
    write_hidden_gradient(buffer, weight, d_hidden)
    assert torch.equal(d_hidden, buffer @ weight)
    for last in (True, False):
        d_weight = add_product(None, buffer.t(), hidden, last)
        assert torch.equal(d_weight, (buffer.t() @ hidden).to(d_weight.dtype))
        if not last:
            assert torch.equal(add_product(d_weight.clone(), buffer.t(), hidden, True), 2 * d_weight)


@sums_on_gpu
@pytest.mark.parametrize("columns", [2000, 2002])
@pytest.mark.parametrize("chunks", [1, 2])
def test_products_of_a_chunk(monkeypatch, columns, chunks):
    """Logits twice, d hidden and dW: four, and for an unaligned vocabulary four more."""
    monkeypatch.setattr(linear_chunked, "wants_aligned_columns", lambda operand: True)
    hidden, weight = (torch.empty(size, 8, dtype=torch.bfloat16, device=GPU) for size in (6, columns))
    d_hidden, total = torch.empty_like(hidden), None
    with Products() as products:
        for chunk in range(chunks):
            for _ in range(2):
                logits = write_logits(hidden, weight, logits_buffer(Head(hidden, weight, None), 6, "triton"))
            write_hidden_gradient(logits, weight, d_hidden)
            total = add_product(total, logits.t(), hidden, last=chunk == chunks - 1)
    assert products.count == chunks * (4 if columns % 8 == 0 else 8)
    assert total is not None
    assert total.dtype == (torch.bfloat16 if chunks == 1 else torch.float32)


class Products(TorchDispatchMode):
    """How many matrix products are started."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += "mm" in func.overloadpacket.__name__
        return func(*args, **(kwargs or {}))


def test_free_memory_is_asked_for_once_in_training_and_once_in_evaluation(monkeypatch):
    device = torch.device("cuda", 7)
    free = iter([2 << 30, 8 << 30])
    monkeypatch.setattr(linear_chunked, "_chunk_bytes", {})
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert linear_chunked.chunk_bytes(device, True) == linear_chunked.GPU_CHUNK_BYTES
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (next(free), 80 << 30))
    for name in ("memory_reserved", "memory_allocated"):
        monkeypatch.setattr(torch.cuda, name, lambda device: 0)
    found = [linear_chunked.chunk_bytes(device, training) for training in (True, True, False, True, False)]
    assert found == [1 << 29, 1 << 29, 3 << 28, 1 << 29, 3 << 28]


@pytest.mark.parametrize(
    ("rows", "most_rows", "expected"),
    [
        (8192, 1569, 1408),  # 6 chunks of 1,366 would be of as many tiles
        (8192, 1400, 1366),  # 1,408 are too many
        (1000, 1000, 1000),  # one chunk
        (1001, 1000, 512),
        (0, 5, 1),
    ],
)
def test_chunks_are_of_whole_tiles_where_these_fit(rows, most_rows, expected):
    assert linear_chunked.even_chunk_rows(rows, most_rows) == expected


def test_ligers_shape_needs_no_more_memory_than_ligers_loss():
    """By the formula of kernels/README.md; Liger's was measured on an H200."""
    rows, columns, width = 8192, 128256, 2048
    chunk_rows = linear_chunked.automatic_chunk_rows(rows, 4 * columns, linear_chunked.GPU_CHUNK_BYTES, False)
    logits, d_weight, d_hidden = 4 * chunk_rows * columns, 4 * columns * width, 2 * rows * width
    assert logits + d_weight + d_hidden <= 1782 << 20
