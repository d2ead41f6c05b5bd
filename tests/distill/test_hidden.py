"""The loss between hidden states, against its formula."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from dwt_ds.config.objective import DistillConfig
from dwt_ds.config.schema import DataConfig, RunConfig, StudentConfig
from dwt_ds.data.batches import Batch, StepBatches
from dwt_ds.data.prepared import PreparedData
from dwt_ds.data.teacher_rows import CommonWords
from dwt_ds.distill.hidden import hidden_loss_of
from dwt_ds.distill.objective import DistillObjective, LossScalars, TeacherView
from dwt_ds.models.build import build_student
from dwt_ds.models.compiled import compile_layers
from dwt_ds.models.masked_lm.families import encoder_layers
from dwt_ds.models.masked_lm.wrapper import GatheredMaskedLM

HIDDEN_WEIGHT, SOFT_WEIGHT = 0.75, 2.5


def model(data: PreparedData, family: str, hidden_size: int, layers: int) -> GatheredMaskedLM:
    torch.manual_seed(hidden_size)
    shape = StudentConfig(family, layers=layers, hidden_size=hidden_size, num_heads=2, max_positions=48, dropout=0.0)
    special = {"pad_token_id": data.facts.pad_id, "cls_token_id": 2, "sep_token_id": 3}
    return GatheredMaskedLM(build_student(shape, vocab_size=data.manifest.vocab_size, seq_len=32, **special))


def objective_of(
    data: PreparedData, family: str = "bert", *, layer: int | None = None, checkpointing: bool = False
) -> DistillObjective:
    student = model(data, family, 16, 3)
    if checkpointing:
        student.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    distill = DistillConfig(hidden_weight=HIDDEN_WEIGHT, hidden_layer=layer)
    config = RunConfig(student=StudentConfig(family, layers=3), distill=distill)
    return DistillObjective(student, distill, data.manifest.vocab_size, hidden_loss_of(student.model, 8, config))


def view_of(teacher: GatheredMaskedLM, batch: Batch) -> TeacherView:
    with torch.no_grad():
        hidden, everywhere = teacher(batch.input_ids, batch.attention_mask, batch.positions, everywhere=True)
    bias = teacher.decoder_bias
    return TeacherView(
        hidden, teacher.decoder_weight.detach(), None if bias is None else bias.detach(), None, everywhere
    )


def batches_of(data: PreparedData) -> list[Batch]:
    """One step's. By sentence, rows of 7 to 48 tokens meet in it; most batches have rows of one length."""
    many: dict[str, Any] = {"micro_batch_size": 12, "accumulation": 3, "rank": 0, "world_size": 1}
    return StepBatches(data.train, data.facts, DataConfig(), seed=3, **many)[6]


def scalars_of(batches: list[Batch]) -> LossScalars:
    labels, tokens = sum(len(each.labels) for each in batches), sum(each.token_count for each in batches)
    return LossScalars(*map(torch.tensor, (SOFT_WEIGHT, 1.0, float(labels), float(labels), float(tokens))))


def expected_distance(
    objective: DistillObjective, teacher: GatheredMaskedLM, batches: list[Batch], layer: int
) -> Tensor:
    """Mean over all real tokens of all micro-batches, fp64."""
    assert objective.hidden_loss is not None
    distances = []
    for each in batches:
        inputs = {"input_ids": each.input_ids, "attention_mask": each.attention_mask}
        ours = objective.student.model.base_model(**inputs, output_hidden_states=True).hidden_states[layer]
        theirs = teacher.model.base_model(**inputs).last_hidden_state.detach()
        real = torch.ones_like(each.input_ids) if each.attention_mask is None else each.attention_mask
        distance = 1 - cosine_similarity(ours @ objective.hidden_loss.projection.weight.T, theirs, dim=-1)
        distances.append(distance[real.bool()])
    return torch.cat(distances).mean()


@pytest.mark.parametrize("layer", [None, 2])
@pytest.mark.parametrize("rows", ["packed", "by_sentence"])
@pytest.mark.parametrize("family", ["bert", "modernbert", "electra"])
def test_accumulated_micro_batches_give_the_plain_formula(
    family: str, rows: str, layer: int | None, request: pytest.FixtureRequest
) -> None:
    """Loss and gradient; by sentence, the micro-batches have different numbers of tokens, and padding."""
    data: PreparedData = request.getfixturevalue(rows)
    objective, teacher, batches = objective_of(data, family, layer=layer), model(data, "bert", 8, 2), batches_of(data)
    assert any(each.attention_mask is not None for each in batches) == (rows == "by_sentence")
    plain, scalars = copy.deepcopy(objective), scalars_of(batches)
    plain.hidden_loss = None
    exact, exact_teacher = copy.deepcopy(objective).double(), copy.deepcopy(teacher).double()
    distance = expected_distance(exact, exact_teacher, batches, layer or 1)
    (HIDDEN_WEIGHT * SOFT_WEIGHT * distance).backward()
    total, found = torch.zeros(()), torch.zeros(())
    for each in batches:
        without = plain(each, view_of(teacher, each), scalars)
        without.loss.backward()
        losses = objective(each, view_of(teacher, each), scalars)
        losses.loss.backward()
        assert losses.hidden is not None
        assert not losses.hidden.requires_grad
        assert without.hidden is None
        total, found = total + losses.loss.detach() - without.loss.detach(), found + losses.hidden
    assert found.item() == pytest.approx(distance.item(), rel=1e-5)
    assert total.item() == pytest.approx(HIDDEN_WEIGHT * SOFT_WEIGHT * distance.item(), rel=1e-5)
    others = dict(plain.named_parameters())
    for name, parameter in exact.named_parameters():
        here = dict(objective.named_parameters())[name].grad
        assert here is not None
        elsewhere = others[name].grad if name in others else None
        difference = here if elsewhere is None else here - elsewhere
        wanted = torch.zeros_like(here) if parameter.grad is None else parameter.grad.float()
        torch.testing.assert_close(difference, wanted, rtol=1e-3, atol=2e-6, msg=name)


@pytest.mark.parametrize("family", ["bert", "modernbert"])
def test_activation_checkpointing_and_compiled_layers_change_nothing(
    family: str, packed: PreparedData, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With checkpointing the layer runs again in the backward pass."""
    monkeypatch.setattr("dwt_ds.models.compiled.torch.compile", partial(torch.compile, backend="aot_eager"))
    teacher, batches = model(packed, "bert", 8, 2), batches_of(packed)
    gradients = []
    for how in ("plain", "checkpointing", "compiled"):
        objective = objective_of(packed, family, layer=2, checkpointing=how == "checkpointing")
        if how == "compiled":
            assert len(compile_layers(objective.student.model)) == (2 if family == "bert" else 3)
        for each in batches:
            objective(each, view_of(teacher, each), scalars_of(batches)).loss.backward()
        gradients.append({name: parameter.grad for name, parameter in objective.named_parameters()})
        assert objective.hidden_loss is not None
        assert objective.hidden_loss._heard is None, "nothing is kept for longer than it is needed"
    for each in gradients[1:]:
        torch.testing.assert_close(gradients[0], each, rtol=1e-5, atol=1e-7)


def test_evaluation_and_a_student_without_its_teacher_have_no_hidden_loss(packed: PreparedData) -> None:
    objective, teacher = objective_of(packed), model(packed, "bert", 8, 2)
    [batch, *_] = batches = batches_of(packed)
    released = objective(batch, None, scalars_of(batches))
    released.loss.backward()
    assert released.hidden is None
    assert objective.hidden_loss is not None
    gradient = objective.hidden_loss.projection.weight.grad
    assert gradient is not None, "under ZeRO-3 it would keep the one of the step before"
    assert not gradient.any()
    assert objective(batch, view_of(teacher, batch), scalars_of(batches)).hidden is not None
    objective.eval()
    assert objective(batch, view_of(teacher, batch), scalars_of(batches)).hidden is None
    assert objective.hidden_loss._heard is None


@pytest.mark.parametrize(("dtype", "off"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_the_means_of_words_are_compared_where_tokens_differ(
    dtype: torch.dtype, off: float, packed: PreparedData
) -> None:
    hidden_loss = objective_of(packed).hidden_loss
    assert hidden_loss is not None
    hidden_loss.to(dtype)
    draw = torch.Generator().manual_seed(2)
    ours, theirs = (torch.randn(*size, generator=draw).to(dtype) for size in ((2, 4, 16), (10, 8)))
    # Word 3 has two tokens here and one there, and word 1 the other way round; 0 is none.
    words = CommonWords(torch.tensor([[0, 1, 2, 0], [3, 3, 0, 0]]), torch.tensor([[0, 1, 1, 2, 0], [0, 0, 3, 0, 0]]), 3)
    hidden_loss.listen()
    hidden_loss._hear(hidden_loss, (), ours)
    expected = 0.0
    for word in (1, 2, 3):
        mean = ours.flatten(0, 1)[words.ours.flatten() == word].mean(0)
        target = theirs[words.theirs.flatten() == word].mean(0)
        expected += 1 - cosine_similarity(hidden_loss.projection(mean), target, dim=0).item()
    assert hidden_loss(theirs, None, words).item() == pytest.approx(expected, rel=off)


@pytest.mark.parametrize("with_words", [False, True])
def test_columns_that_only_the_layers_have_are_left_out(packed: PreparedData, with_words: bool) -> None:
    """Longformer's have as many as fill its last attention window."""
    hidden_loss = objective_of(packed).hidden_loss
    assert hidden_loss is not None
    draw = torch.Generator().manual_seed(2)
    ours, theirs = torch.randn(2, 8, 16, generator=draw), torch.randn(10, 8, generator=draw)
    words = CommonWords(
        torch.tensor([[0, 1, 2, 0, 0], [3, 3, 0, 0, 0]]), torch.tensor([[0, 1, 1, 2, 0], [0, 0, 3, 0, 0]]), 3
    )
    distances = []
    for heard in (ours, ours[:, :5]):
        hidden_loss.listen()
        hidden_loss._hear(hidden_loss, (), heard)
        distances.append(hidden_loss(theirs, torch.ones(2, 5), words if with_words else None))
    assert torch.equal(*distances)


@pytest.mark.parametrize(("layers", "layer"), [(2, 1), (4, 1), (5, 2), (6, 2), (12, 4)])
def test_without_a_layer_of_its_own_it_is_on_the_one_a_third_of_the_way_up(layers: int, layer: int) -> None:
    shape = StudentConfig(layers=layers, hidden_size=16, num_heads=2, max_positions=48)
    student = build_student(shape, vocab_size=40, seq_len=32, pad_token_id=0)
    hidden_loss_of(student, 8, RunConfig(student=shape, distill=DistillConfig(hidden_weight=0.5)))
    heard = [number for number, each in enumerate(encoder_layers(student), start=1) if each._forward_hooks]
    assert heard == [layer]


@pytest.mark.parametrize("family", ["albert", "squeezebert"])
def test_layers_that_cannot_be_read_apart_are_refused(family: str, packed: PreparedData) -> None:
    """ALBERT's layers are one and the same; SqueezeBERT calls its layers past their hooks."""
    student = StudentConfig(
        family, layers=3, hidden_size=16, num_heads=4, max_positions=48, config={"embedding_size": 16}
    )
    config = RunConfig(student=student, distill=DistillConfig(hidden_weight=0.5))
    built = build_student(student, vocab_size=packed.manifest.vocab_size, seq_len=32, pad_token_id=0)
    with pytest.raises(ValueError, match=rf"^distill.hidden_weight: student.family='{family}' has no .*; set it to 0"):
        hidden_loss_of(built, 8, config)


def test_the_last_layer_is_refused_with_the_settings() -> None:
    with pytest.raises(ValueError, match="distill.hidden_layer=6: must be one below .* last, and student.layers is 6"):
        RunConfig(student=StudentConfig(layers=6), distill=DistillConfig(hidden_weight=0.5, hidden_layer=6))
    with pytest.raises(ValueError, match="distill.hidden_layer=1: must be one below .* last, and student.layers is 1"):
        RunConfig(student=StudentConfig(layers=1), distill=DistillConfig(hidden_weight=0.5))
