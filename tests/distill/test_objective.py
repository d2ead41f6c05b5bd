"""The objective over accumulated micro-batches against the plain formula in fp64."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, log_softmax

from dwt_ds.config.objective import DistillConfig
from dwt_ds.config.schema import DataConfig, StudentConfig
from dwt_ds.data.batches import Batch, StepBatches
from dwt_ds.data.prepared import PreparedData
from dwt_ds.distill.objective import DistillObjective, LossScalars, TeacherView
from dwt_ds.models.build import build_student
from dwt_ds.models.masked_lm.wrapper import GatheredMaskedLM

HARD_WEIGHT, SOFT_WEIGHT, TEMPERATURE = 0.7, 2.5, 1.7


def model(data: PreparedData, hidden_size: int) -> GatheredMaskedLM:
    shape = StudentConfig(layers=1, hidden_size=hidden_size, num_heads=2, max_positions=48, dropout=0.0)
    torch.manual_seed(hidden_size)
    built = build_student(shape, vocab_size=data.manifest.vocab_size, seq_len=32, pad_token_id=data.facts.pad_id)
    for parameter in built.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return GatheredMaskedLM(built)


def first_batch(data: PreparedData) -> Batch:
    [batch] = StepBatches(
        data.train, data.facts, DataConfig(), seed=3, micro_batch_size=4, accumulation=1, rank=0, world_size=1
    )[0]
    return batch


def all_logits(gathered: GatheredMaskedLM, batch: Batch) -> Tensor:
    """(B x S, V) fp64."""
    logits = gathered.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
    return logits.flatten(0, 1)


def plain_loss(
    student: GatheredMaskedLM, teacher: GatheredMaskedLM | None, batches: list[Batch], config: DistillConfig
) -> Tensor:
    """The mean over all rows of all micro-batches, by its definition."""
    hard = torch.cat(
        [
            cross_entropy(
                all_logits(student, batch)[batch.positions[: len(batch.labels)]], batch.labels, reduction="none"
            )
            for batch in batches
        ]
    )
    loss = HARD_WEIGHT * hard.mean()
    if teacher is None:
        return loss
    soft = torch.cat([divergences(student, teacher, batch, batch.positions) for batch in batches])
    return loss + SOFT_WEIGHT * soft.mean() * (TEMPERATURE**2 if config.temperature_squared else 1.0)


def divergences(student: GatheredMaskedLM, teacher: GatheredMaskedLM, batch: Batch, positions: Tensor) -> Tensor:
    """(N,) fp64: KL(teacher || student) at TEMPERATURE."""
    ours, theirs = (all_logits(each, batch)[positions] for each in (student, teacher))
    log_p_t, log_p_s = (log_softmax(each / TEMPERATURE, -1) for each in (theirs.detach(), ours))
    return (log_p_t.exp() * (log_p_t - log_p_s)).sum(-1)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"soft_positions": "all"},
        {"soft_positions": 0.3},
        {"temperature_squared": True},
        {"soft_positions": "all", "temperature_squared": True},
        {"alone": True},
    ],
)
@pytest.mark.parametrize("rows", ["packed", "by_sentence"])
def test_accumulated_micro_batches_give_the_plain_formula(
    settings: dict[str, Any], rows: str, request: pytest.FixtureRequest
) -> None:
    """Loss and gradient; the micro-batches have different numbers of labels and of tokens."""
    data: PreparedData = request.getfixturevalue(rows)
    alone = settings.get("alone", False)
    config = DistillConfig(hard_weight=HARD_WEIGHT, **{k: v for k, v in settings.items() if k != "alone"})
    batches = StepBatches(
        data.train,
        data.facts,
        DataConfig(mask_probability=0.3, label_draw="bernoulli"),
        seed=3,
        micro_batch_size=3,
        accumulation=3,
        rank=0,
        world_size=1,
        soft_positions=config.soft_positions,
    )[0]
    labelled = [len(batch.labels) for batch in batches]
    assert len(set(labelled)) > 1
    student, teacher = model(data, 16), None if alone else model(data, 8)
    exact_student, exact_teacher = (
        None if each is None else copy.deepcopy(each).double() for each in (student, teacher)
    )
    assert exact_student is not None
    expected = plain_loss(exact_student, exact_teacher, batches, config)
    expected.backward()

    objective = DistillObjective(student, config, data.manifest.vocab_size)
    positions = sum(len(batch.positions) for batch in batches)
    scalars = LossScalars(*map(torch.tensor, (SOFT_WEIGHT, TEMPERATURE, float(sum(labelled)), float(positions), 1.0)))
    total, labelled_soft = torch.zeros(()), torch.zeros(())
    for batch in batches:
        view = None
        if teacher is not None:
            with torch.no_grad():
                hidden = teacher(batch.input_ids, batch.attention_mask, batch.positions)
            view = TeacherView(hidden, teacher.decoder_weight.detach(), teacher.decoder_bias.detach())  # type: ignore[union-attr]
        loss = objective(batch, view, scalars)
        loss.loss.backward()
        total += loss.loss.detach()
        if loss.labelled_soft is not None:
            labelled_soft += loss.labelled_soft
        assert loss.loss.item() == pytest.approx(
            HARD_WEIGHT * loss.hard.item() + SOFT_WEIGHT * loss.soft.item(), rel=1e-5
        )
    assert total.item() == pytest.approx(expected.item(), rel=1e-5)
    if config.soft_positions != "labelled":
        assert exact_teacher is not None
        of_labelled = [divergences(exact_student, exact_teacher, b, b.positions[: len(b.labels)]) for b in batches]
        squared = TEMPERATURE**2 if config.temperature_squared else 1.0
        assert labelled_soft.item() == pytest.approx(squared * torch.cat(of_labelled).mean().item(), rel=1e-5)
    exact = dict(exact_student.named_parameters())
    for name, parameter in student.named_parameters():
        torch.testing.assert_close(parameter.grad, exact[name].grad.float(), rtol=1e-3, atol=1e-6)  # type: ignore[union-attr]


@pytest.mark.parametrize("config", [DistillConfig(backend="triton"), DistillConfig(memory="logit_free")])
def test_the_loss_is_computed_by_the_kernel_of_the_recipe(config: DistillConfig, packed: PreparedData) -> None:
    """Which the CPU does not have."""
    one, batch = torch.ones(()), first_batch(packed)
    with pytest.raises(ValueError, match='="(triton|logit_free)" needs '):
        DistillObjective(model(packed, 16), config, packed.manifest.vocab_size)(batch, None, LossScalars(*[one] * 5))


def test_columns_beyond_the_vocabulary_have_no_probability(packed: PreparedData) -> None:
    batch, one = first_batch(packed), torch.ones(())
    student, teacher = model(packed, 16), model(packed, 8)
    losses = []
    for extra in (0, 5):
        with torch.no_grad():
            hidden = teacher(batch.input_ids, batch.attention_mask, batch.positions)
            padded = torch.cat([teacher.decoder_weight, 9 * torch.ones(extra, 8)])
            bias = torch.cat([teacher.decoder_bias, 9 * torch.ones(extra)])  # type: ignore[list-item]
            objective = DistillObjective(student, DistillConfig(), packed.manifest.vocab_size)
            losses.append(
                objective(batch, TeacherView(hidden, padded, bias), LossScalars(one, one, one, one, one)).soft.item()
            )
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
