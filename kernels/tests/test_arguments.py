"""Every mistake in the arguments is a ValueError of one line that names the argument."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from dwt_kernels import distill_loss, linear_distill_loss

LABELS = torch.tensor([0, 6, -100])


def logits(rows: int = 3, columns: int = 7, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.zeros(rows, columns, dtype=dtype)


def assert_one_line(error: pytest.ExceptionInfo[ValueError], name: str) -> None:
    message = str(error.value)
    assert name in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("student_logits", ([[0.0]], logits(), LABELS)),
        ("student_logits", (torch.zeros(3), logits(), LABELS)),
        ("student_logits", (logits(dtype=torch.float64), logits(), LABELS)),
        ("teacher_logits", (logits(), torch.zeros(3, 7, 1), LABELS)),
        ("teacher_logits", (logits(), logits(dtype=torch.int64), LABELS)),
        ("teacher_logits", (logits(), logits(rows=2), LABELS)),
        ("teacher_logits", (logits(), logits().requires_grad_(), LABELS)),
        ("teacher_logits", (logits(), logits().to("meta"), LABELS)),
        ("teacher_logits is 8 words wide and student_logits 7; pass vocab_size", (logits(), logits(columns=8), LABELS)),
        ("labels", (logits(), logits(), LABELS.int())),
        ("labels", (logits(), logits(), LABELS[:2])),
        ("labels", (logits(), logits(), [0, 6, -100])),
        ("labels", (logits(), logits(), torch.tensor([0, 7, -100]))),
        ("labels", (logits(), logits(), torch.tensor([0, -1, -100]))),
    ],
)
def test_tensors(name, arguments):
    with pytest.raises(ValueError, match=name) as error:
        distill_loss(*arguments)
    assert_one_line(error, name)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", 0.0),
        ("temperature", -1),
        ("temperature", float("inf")),
        ("temperature", float("nan")),
        ("temperature", "2"),
        ("temperature", True),
        ("temperature", torch.tensor(0.0)),
        ("temperature", torch.tensor([2.0])),
        ("temperature", torch.tensor(2.0, requires_grad=True)),
        ("temperature", torch.tensor(2.0, device="meta")),
        ("hard_weight", None),
        ("hard_weight", torch.ones(3)),
        ("soft_weight", "1"),
        ("ignore_index", -100.0),
        ("ignore_index", True),
        ("soft_positions", "labeled"),
        ("vocab_size", 0),
        ("vocab_size", 8),
        ("vocab_size", 7.0),
        ("vocab_size", 6),
        ("normalizer", 0),
        ("normalizer", -3.0),
        ("normalizer", float("nan")),
        ("normalizer", (3.0, 0.0)),
        ("normalizer", ()),
        ("normalizer", (1,)),
        ("normalizer", [1, 2, 3]),
        ("normalizer", torch.tensor(-1.0)),
        ("normalizer", torch.ones(2)),
        ("reduction", "batchmean"),
        ("backend", "cuda"),
    ],
    ids=str,
)
def test_keywords(name, value):
    with pytest.raises(ValueError, match="labels" if (name, value) == ("vocab_size", 6) else name) as error:
        distill_loss(logits(), logits(), LABELS, **{name: value})
    assert_one_line(error, name)


HEAD = {"hidden": (3, 4), "weight": (7, 4), "bias": (7,)}


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("student_hidden", {"student_hidden": torch.zeros(3)}),
        ("student_weight", {"student_weight": torch.zeros(7, 5)}),
        ("student_weight", {"student_weight": torch.zeros(7, 4, dtype=torch.bfloat16)}),
        ("student_bias", {"student_bias": torch.zeros(6)}),
        ("student_bias", {"student_bias": torch.zeros(7, 1)}),
        ("teacher_hidden", {"teacher_hidden": torch.zeros(2, 4)}),
        ("teacher_weight", {"teacher_weight": torch.zeros(7, 3)}),
        ("teacher_weight", {"teacher_weight": None}),
        ("teacher_hidden", {"teacher_hidden": torch.zeros(3, 4, requires_grad=True)}),
        ("teacher_weight", {"teacher_weight": torch.zeros(7, 4, requires_grad=True)}),
        ("teacher_bias", {"teacher_bias": torch.zeros(7, requires_grad=True)}),
        ("teacher_weight is 8 words", {"teacher_weight": torch.zeros(8, 4), "teacher_bias": torch.zeros(8)}),
        ("labels", {"labels": LABELS[:2]}),
        ("memory", {"memory": "tiled"}),
        ("memory", {"memory": "logit_free", "backend": "torch"}),
        ("chunk_rows", {"chunk_rows": 0}),
        ("chunk_rows", {"chunk_rows": 2.0}),
        ("temperature", {"temperature": 0.0}),
        ("normalizer", {"normalizer": (1, 2, 3)}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_linear_form(name, changes):
    heads = {f"{model}_{part}": torch.zeros(shape) for model in ("student", "teacher") for part, shape in HEAD.items()}
    with pytest.raises(ValueError, match=name) as error:
        linear_distill_loss(**{**heads, "labels": LABELS, **changes})
    assert_one_line(error, name)


def test_without_teacher_hidden_it_is_the_hard_loss():
    student = torch.randn(3, 4), torch.randn(7, 4), None
    teacher = torch.randn(7, 5), torch.randn(7)
    assert linear_distill_loss(*student, None, *teacher, LABELS) == linear_distill_loss(
        *student, None, None, None, LABELS
    )


def test_numpy_scalars_are_accepted():
    values = {"temperature": np.float32(2.0), "soft_weight": np.int64(3), "normalizer": (np.float64(2.0), 1)}
    plain = {"temperature": 2.0, "soft_weight": 3, "normalizer": (2.0, 1)}
    models = torch.randn(3, 7), torch.randn(3, 7)
    assert distill_loss(*models, LABELS, **values) == distill_loss(*models, LABELS, **plain)


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="there Triton takes tensors of a CPU")
def test_triton_without_a_gpu_says_what_to_do():
    pytest.importorskip("triton")
    with pytest.raises(ValueError, match="needs a GPU.*TRITON_INTERPRET=1") as error:
        distill_loss(logits(), logits(), LABELS, backend="triton")
    assert_one_line(error, "backend")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: there the values are asserted on the device")
@pytest.mark.parametrize("case", ["labels", "temperature"])
def test_values_on_a_gpu_are_asserted_on_the_device(case):
    """An assertion ends the process's use of the GPU, so each is in its own."""
    program = (
        "import torch; from dwt_kernels import distill_loss; z = torch.zeros(1, 2, device='cuda')\n"
        f"label = torch.tensor([{2 if case == 'labels' else 0}], device='cuda')\n"
        f"tau = torch.tensor({0.0 if case == 'temperature' else 1.0}, device='cuda')\n"
        "distill_loss(z, z, label, temperature=tau); torch.cuda.synchronize()"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode != 0
    assert "assert" in done.stderr
