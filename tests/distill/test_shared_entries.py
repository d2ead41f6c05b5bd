"""The soft loss of a teacher with a vocabulary of its own, against the plain formula in fp64."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, log_softmax
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import BertConfig, BertForMaskedLM

from dwt_ds.config.objective import DistillConfig
from dwt_ds.data.batches import Batch
from dwt_ds.data.shared_vocabulary import SharedVocabulary
from dwt_ds.data.teacher_rows import CommonWords, TeacherRows
from dwt_ds.distill.evaluate import held_out_loss, teacher_held_out_loss
from dwt_ds.distill.objective import DistillObjective, LossScalars, SharedEntries, TeacherView
from dwt_ds.models.masked_lm.wrapper import GatheredMaskedLM

OURS, THEIRS, ROWS, WIDTH, THEIR_WIDTH, PADDING = 37, 41, 3, 12, 15, 3
HARD_WEIGHT, SOFT_WEIGHT, TEMPERATURE = 0.7, 2.5, 1.7
# The interpreter of Triton has to be chosen before Triton is imported: the last test starts a process for it.
IN_INTERPRETER = os.environ.get("TRITON_INTERPRET") == "1"
KERNELS = [("triton", "chunked"), ("triton", "logit_free")] if IN_INTERPRETER else [("torch", "chunked")]
FEW = "plain_formula and untied and not squared"
CPU = torch.device("cpu")


def shared_vocabulary() -> SharedVocabulary:
    """Twenty entries, in another order in the teacher's vocabulary."""
    draw = np.random.default_rng(4)
    ours, theirs = np.sort(draw.permutation(OURS)[:20]), draw.permutation(THEIRS)[:20]
    index = np.full(OURS, -1)
    index[ours] = np.arange(20)
    return SharedVocabulary(ours, theirs, index, 20 / OURS, 20 / THEIRS)


SHARED = shared_vocabulary()
ENTRIES = SharedEntries.of(SHARED, CPU)


def model(vocabulary: int, hidden_size: int, *, tied: bool = True) -> GatheredMaskedLM:
    torch.manual_seed(hidden_size)
    config = BertConfig(
        vocab_size=vocabulary,
        hidden_size=hidden_size,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=16,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        tie_word_embeddings=tied,
    )
    built = BertForMaskedLM(config)
    for parameter in built.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return GatheredMaskedLM(built)


def batch(seed: int, aligned_of: int = 3) -> Batch:
    """Some 14 labelled tokens, of which those with a shared label are aligned, one of `aligned_of` left out; 0: none
    is aligned."""
    draw = np.random.default_rng(seed)
    labels = draw.integers(0, OURS, 14)
    aligned = np.flatnonzero(SHARED.shared_index_of_student[labels] >= 0)
    aligned = np.delete(aligned, slice(None, None, aligned_of)) if aligned_of else aligned[:0]
    positions = np.sort(draw.permutation(ROWS * WIDTH)[:14])
    mask = np.ones((ROWS, THEIR_WIDTH), dtype=np.int64)
    mask[1, 11:] = 0
    there = np.sort(draw.permutation(np.flatnonzero(mask))[: len(aligned)])
    tensors = map(torch.from_numpy, (draw.integers(0, THEIRS, mask.shape), mask, there, aligned))
    return Batch(
        torch.from_numpy(draw.integers(0, OURS, (ROWS, WIDTH))),
        None,
        torch.from_numpy(positions),
        torch.from_numpy(labels),
        ROWS * WIDTH,
        torch.arange(ROWS),
        TeacherRows(*tensors, CommonWords(torch.zeros(ROWS, WIDTH), torch.zeros(mask.shape), 0)),
    )


def logits_at(gathered: GatheredMaskedLM, rows: Batch | TeacherRows, columns: int) -> Tensor:
    """(N, columns), by the model's own forward pass."""
    logits = gathered.model(input_ids=rows.input_ids, attention_mask=rows.attention_mask).logits
    return logits.flatten(0, 1)[rows.positions, :columns]


def plain(
    student: GatheredMaskedLM, teacher: GatheredMaskedLM, batches: list[Batch], *, squared: bool = False
) -> dict[str, Tensor]:
    """Means over all micro-batches, by their definitions: every logit of both models, then the shared columns."""
    hard, soft, shared_hard, theirs_hard, mass = [], [], [], [], []
    for each in batches:
        assert each.teacher is not None
        logits = logits_at(student, each, OURS)
        hard.append(cross_entropy(logits, each.labels, reduction="none"))
        their_logits = logits_at(teacher, each.teacher, THEIRS).detach()
        ours, theirs = logits[each.teacher.aligned][:, ENTRIES.student_ids], their_logits[:, SHARED.teacher_ids]
        log_p_t, log_p_s = (log_softmax(some / TEMPERATURE, -1) for some in (theirs, ours))
        soft.append((log_p_t.exp() * (log_p_t - log_p_s)).sum(-1))
        entries = SHARED.student_ids.tolist()
        targets = torch.tensor([entries.index(label) for label in each.labels[each.teacher.aligned].tolist()]).long()
        shared_hard.append(cross_entropy(ours, targets, reduction="none"))
        theirs_hard.append(cross_entropy(theirs, targets, reduction="none"))
        mass.append(their_logits.softmax(-1)[:, SHARED.teacher_ids].sum(-1))
    names = ("hard", "soft", "shared_hard", "theirs_hard", "mass")
    means = {name: torch.cat(rows).mean() for name, rows in zip(names, (hard, soft, shared_hard, theirs_hard, mass))}
    means["soft"] = means["soft"] * (TEMPERATURE**2 if squared else 1)
    means["loss"] = HARD_WEIGHT * means["hard"] + SOFT_WEIGHT * means["soft"]
    return means


def whole_head(teacher: GatheredMaskedLM, each: Batch) -> TeacherView:
    assert each.teacher is not None
    with torch.no_grad():
        hidden = teacher(each.teacher.input_ids, each.teacher.attention_mask, each.teacher.positions)
    bias = teacher.decoder_bias
    assert bias is not None
    return TeacherView(hidden, teacher.decoder_weight.detach(), bias.detach())


def shared_head(teacher: GatheredMaskedLM, each: Batch) -> TeacherView:
    hidden, weight, bias, *_ = whole_head(teacher, each)
    assert bias is not None
    return TeacherView(hidden, weight[SHARED.teacher_ids], bias[SHARED.teacher_ids], ENTRIES)


@pytest.mark.parametrize(("backend", "memory"), KERNELS)
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("squared", [False, True], ids=["", "squared"])
def test_loss_and_gradients_are_those_of_the_plain_formula(
    squared: bool, tied: bool, backend: Any, memory: Any
) -> None:
    """Over three micro-batches, one of which has no aligned token."""
    batches = [batch(1), batch(2, aligned_of=0), batch(3, aligned_of=5)]
    student, teacher = model(OURS + PADDING, 8, tied=tied), model(THEIRS + PADDING, 6)
    exact = copy.deepcopy(student).double()
    expected = plain(exact, copy.deepcopy(teacher).double(), batches, squared=squared)
    expected["loss"].backward()

    config = DistillConfig(hard_weight=HARD_WEIGHT, temperature_squared=squared, backend=backend, memory=memory)
    objective = DistillObjective(student, config, OURS)
    aligned = sum(len(each.teacher.aligned) for each in batches if each.teacher is not None)
    scalars = LossScalars(*map(torch.tensor, (SOFT_WEIGHT, TEMPERATURE, 14.0 * len(batches), float(aligned), 1.0)))
    sums = dict.fromkeys(("loss", "hard", "soft", "shared_hard"), 0.0)
    for each in batches:
        losses = objective(each, shared_head(teacher, each), scalars)
        losses.loss.backward()
        sums = {name: total + getattr(losses, name).item() for name, total in sums.items()}
    assert sums == pytest.approx({name: expected[name].item() for name in sums}, rel=1e-5)
    gradients = {name: each.grad.float() for name, each in exact.named_parameters() if each.grad is not None}
    found = {name: each.grad for name, each in student.named_parameters() if each.grad is not None}
    torch.testing.assert_close(found, gradients, rtol=1e-3, atol=1e-6)


def test_no_gradient_of_the_soft_loss_reaches_entries_that_are_not_shared() -> None:
    student, teacher, one = model(OURS, 8, tied=False), model(THEIRS, 6), torch.ones(())
    objective = DistillObjective(student, DistillConfig(hard_weight=0.0), OURS)
    each = batch(1)
    objective(each, shared_head(teacher, each), LossScalars(one, one, one, one, one)).loss.backward()
    moved = student.decoder_weight.grad.abs().sum(1) > 0  # type: ignore[union-attr]
    assert moved.nonzero().flatten().tolist() == SHARED.student_ids.tolist()


def test_without_the_teacher_only_the_hard_loss_is_left() -> None:
    """After its release the loader still makes its rows."""
    student, one = model(OURS, 8), torch.ones(())
    each = batch(1)
    objective, scalars = DistillObjective(student, DistillConfig(), OURS), LossScalars(one, one, one, one, one)
    losses, alone = objective(each, None, scalars), objective(each._replace(teacher=None), None, scalars)
    assert losses.loss.item() == alone.loss.item()
    assert losses.shared_hard is None


def test_held_out_losses_are_means_over_the_aligned_tokens() -> None:
    batches = [batch(1), batch(2, aligned_of=0), batch(3, aligned_of=5)]
    student, teacher = model(OURS, 8), model(THEIRS + PADDING, 6)
    for weight, bias in ((each.decoder_weight, each.decoder_bias) for each in (teacher,)):
        with torch.no_grad():  # padding has no probability, whatever its logits
            weight[THEIRS:], bias[THEIRS:] = 9.0, 9.0  # type: ignore[index]
    expected = plain(copy.deepcopy(student).double(), copy.deepcopy(teacher).double(), batches)

    def found_in(batches: list[Batch]) -> Any:
        objective, head = DistillObjective(student, DistillConfig(), OURS), lambda each: shared_head(teacher, each)
        return held_out_loss(objective, head, batches, TEMPERATURE, lambda sums: sums, CPU)

    found = found_in(batches)
    wanted = [expected[name].item() for name in ("hard", "soft", "shared_hard")]
    assert list(found) == pytest.approx(wanted, rel=1e-5)
    assert found_in([batch(2, aligned_of=0)])[1:] == (0.0, 0.0), "labels, of which none is aligned"

    def loss_of(batches: list[Batch], others: Tensor | None = None) -> Any:
        reduce_sum = (lambda sums: sums) if others is None else (lambda sums: sums + others)
        whole = lambda each: whole_head(teacher, each)  # noqa: E731
        return teacher_held_out_loss(whole, batches, THEIRS, DistillConfig(), reduce_sum, CPU, SHARED)

    theirs = loss_of(batches)
    assert list(theirs) == pytest.approx([expected["theirs_hard"].item(), expected["mass"].item()], rel=1e-5)
    assert 0 < theirs.shared_mass < 1
    aligned = sum(len(each.teacher.aligned) for each in batches if each.teacher is not None)
    more = loss_of(batches, torch.tensor([6.0, 2.0, 4.0], dtype=torch.float64))
    assert more.hard_loss == pytest.approx((theirs.hard_loss * aligned + 6) / (aligned + 4))
    assert loss_of([batch(2, aligned_of=0)]) is None


class CopiesFromTheHost(TorchDispatchMode):
    """Counts what `torch.tensor` makes: on a GPU the host waits for each."""

    count = 0

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += operation is torch.ops.aten.lift_fresh.default
        return operation(*args, **(kwargs or {}))


def test_an_evaluation_copies_no_number_for_each_batch() -> None:
    student, teacher, each = model(OURS, 8), model(THEIRS, 6), batch(1)
    objective, config = DistillObjective(student, DistillConfig(), OURS), DistillConfig()
    some, whole = shared_head(teacher, each), whole_head(teacher, each)

    def copies(batches: list[Batch]) -> int:
        with CopiesFromTheHost() as copied:
            held_out_loss(objective, lambda _: some, batches, TEMPERATURE, lambda sums: sums, CPU)
            teacher_held_out_loss(lambda _: whole, batches, THEIRS, config, lambda sums: sums, CPU, SHARED)
        return copied.count

    assert copies([each] * 3) == copies([each])


@pytest.mark.slow
@pytest.mark.skipif(IN_INTERPRETER, reason="it is the process that this test starts")
def test_the_same_by_triton_in_its_interpreter() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, "-k", FEW]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert "2 passed" in ended.stdout, ended.stdout + ended.stderr
