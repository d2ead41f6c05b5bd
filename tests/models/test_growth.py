from __future__ import annotations

import copy
import pydoc_data.topics
import re
from typing import Any

import pytest
import torch
from torch.nn import functional
from transformers import PreTrainedModel

from dwt_ds.config.schema import StudentConfig
from dwt_ds.models.build import build_student
from dwt_ds.models.growth import grow as growth
from dwt_ds.models.growth.grow import grow, leading, random_copies, round_robin, widen
from dwt_ds.models.growth.layout import GROWABLE_FAMILIES
from dwt_ds.models.growth.plan import DEPTH_MAPS, WIDTH_METHODS

V, S = 61, 20
DATA = {"vocab_size": V, "seq_len": S, "pad_token_id": 1, "cls_token_id": 2, "sep_token_id": 3}
TEACHER = {"layers": 2, "hidden_size": 16, "num_heads": 4, "intermediate_size": 24, "max_positions": S, "dropout": 0}
WIDER = {"hidden_size": 48, "num_heads": 12, "intermediate_size": 72}
METHODS = [*DEPTH_MAPS, *WIDTH_METHODS, "stack+fpi", "interlace+fna", "bert2bert+aki", "stack+net2net"]


def model(family: str, seed: int = 0, pad: int = 1, **changes: Any) -> PreTrainedModel:
    """fp64, with no parameter left at the zeros and ones it starts from."""
    own = {"embedding_size": 8} if family in ("electra", "albert") else {}
    own |= {"local_attention": 32} if family == "modernbert" else {}
    settings = {**TEACHER, **changes, "config": own | changes.get("config", {})}
    torch.manual_seed(seed)
    made = build_student(StudentConfig(family=family, **settings), **DATA | {"pad_token_id": pad}).double().eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return made


def grown(
    family: str, method: str, *, teachers: dict[str, Any] | None = None, **students: Any
) -> tuple[PreTrainedModel, PreTrainedModel]:
    """(teacher, student grown from it), each with its changes."""
    teacher, student = model(family, **(teachers or {})), model(family, 1, **students)
    grow(teacher, student, method, seed=0)
    return teacher, student


def assert_same_function(student: PreTrainedModel, teacher: PreTrainedModel, atol: float = 1e-10) -> None:
    torch.testing.assert_close(logits(student), logits(teacher), rtol=0, atol=atol)


def logits(of: PreTrainedModel) -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    input_ids = torch.randint(4, V, (3, S), generator=generator)
    attention_mask = torch.ones_like(input_ids)
    input_ids[1, 15:], attention_mask[1, 15:] = 1, 0
    with torch.no_grad():
        return of(input_ids=input_ids, attention_mask=attention_mask).logits[attention_mask.bool()]


def layers(of: PreTrainedModel) -> Any:
    return of.base_model.encoder.layer


UNTIED, WIDER_TABLES = {"tie_word_embeddings": False}, {"embedding_size": 24}


@pytest.mark.parametrize(
    ("family", "config"),
    [
        *((family, config) for family in GROWABLE_FAMILIES for config in ({}, UNTIED)),
        *((family, WIDER_TABLES) for family in ("electra", "albert")),
    ],
)
def test_fpi_keeps_the_function_when_only_the_width_grows(family: str, config: dict[str, Any]) -> None:
    teacher, student = grown(family, "fpi", **WIDER, config=config)
    tied = student.get_output_embeddings().weight is student.get_input_embeddings().weight
    assert tied == (config is not UNTIED)
    assert_same_function(student, teacher)
    torch.testing.assert_close(logits(student.float()), logits(teacher).float(), rtol=0, atol=1e-4)


@pytest.mark.parametrize("family", ["bert", "modernbert"])
def test_net2net_keeps_the_function_of_a_wider_feed_forward(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(growth, "NET2NET_NOISE", 0.0)
    teacher, student = grown(family, "net2net", intermediate_size=41)
    assert_same_function(student, teacher)


@pytest.mark.parametrize("family", GROWABLE_FAMILIES)
@pytest.mark.parametrize("method", DEPTH_MAPS)
def test_the_same_depth_and_width_is_a_copy(family: str, method: str) -> None:
    teacher, student = grown(family, method)
    assert_same_function(student, teacher, atol=0)


@pytest.mark.parametrize("family", GROWABLE_FAMILIES)
@pytest.mark.parametrize("method", METHODS)
def test_shapes_and_ties_survive_every_method(family: str, method: str) -> None:
    teacher = model(family)
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    student = model(family, 1, layers=5, **({} if method in DEPTH_MAPS else WIDER))
    shapes = {name: value.shape for name, value in student.state_dict().items()}
    grow(teacher, student, method, seed=0)
    assert {name: value.shape for name, value in student.state_dict().items()} == shapes
    assert student.get_output_embeddings().weight is student.get_input_embeddings().weight
    assert torch.isfinite(logits(student)).all()
    for name, value in teacher.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_remap_is_the_two_steps_of_the_paper() -> None:
    teacher, student = grown("bert", "remap", teachers={"layers": 4}, layers=6)
    for layer, source in zip(layers(student), [0, 1, 2, 3, 3, 3], strict=True):
        for (name, ours), theirs in zip(layer.named_parameters(), layers(teacher)[source].parameters(), strict=True):
            assert torch.equal(ours, theirs), name
    inner = re.compile(r"encoder\.layer\.")
    theirs = teacher.state_dict()
    for name, value in student.state_dict().items():
        assert inner.search(name) or torch.equal(value, theirs[name]), name
    student_weight = student.bert.encoder.layer[5].output.dense.weight
    assert student_weight.data_ptr() != student.bert.encoder.layer[4].output.dense.weight.data_ptr()


@pytest.mark.parametrize("method", ["stack", "bert2bert", "interlace"])
def test_other_depth_maps_copy_the_layers_they_name(method: str) -> None:
    teacher, student = grown("distilbert", method, teachers={"layers": 4}, layers=6)
    for layer in range(6):
        source = DEPTH_MAPS[method](layer, 4, 6)
        ours = student.distilbert.transformer.layer[layer].ffn.lin1.weight
        assert torch.equal(ours, teacher.distilbert.transformer.layer[source].ffn.lin1.weight)


def test_modernbert_layers_grown_from_the_first_keep_their_own_norm() -> None:
    teacher = model("modernbert")
    student = model("modernbert", 1, layers=4)
    own = student.model.layers[1].attn_norm.weight.clone()
    grow(teacher, student, "interlace", seed=0)
    assert torch.equal(student.model.layers[1].attn_norm.weight, own)
    assert torch.equal(student.model.layers[1].attn.Wqkv.weight, teacher.model.layers[0].attn.Wqkv.weight)


def test_fna_puts_the_teacher_in_the_corner() -> None:
    teacher = model("bert")
    student = model("bert", 1, **WIDER)
    own = {name: value.clone() for name, value in student.state_dict().items()}
    grow(teacher, student, "fna", seed=0)
    theirs, ours = teacher.state_dict(), student.state_dict()
    name = "bert.encoder.layer.1.output.dense.weight"
    expected = torch.zeros(48, 72, dtype=torch.float64)
    expected[:16, :24] = theirs[name]
    assert torch.equal(ours[name], expected)
    for name in ("bert.encoder.layer.0.attention.output.LayerNorm.weight", "bert.encoder.layer.0.output.dense.bias"):
        assert torch.equal(ours[name][:16], theirs[name])
        assert torch.equal(ours[name][16:], own[name][16:])
    tokens = ours["bert.embeddings.word_embeddings.weight"]
    assert torch.equal(tokens[:, :16], theirs["bert.embeddings.word_embeddings.weight"])
    assert not tokens[:, 16:].any()


def test_fused_matrices_are_widened_block_by_block() -> None:
    teacher, student = grown("modernbert", "fna", **WIDER)
    ours, theirs = student.model.layers[1].attn.Wqkv.weight, teacher.model.layers[1].attn.Wqkv.weight
    for block in range(3):
        assert torch.equal(ours[block * 48 : block * 48 + 16, :16], theirs[block * 16 : (block + 1) * 16])
        assert not ours[block * 48 + 16 : (block + 1) * 48].any()
    ours, theirs = student.model.layers[1].mlp.Wi.weight, teacher.model.layers[1].mlp.Wi.weight
    for block in range(2):
        assert torch.equal(ours[block * 72 : block * 72 + 24, :16], theirs[block * 24 : (block + 1) * 24])


def test_aki_takes_added_outputs_from_the_layer_above() -> None:
    fpi, aki = (grown("bert", method, **WIDER)[1] for method in ("fpi", "aki"))
    for module, old in (("attention.self.query", 16), ("attention.output.dense", 16), ("intermediate.dense", 24)):
        for leaf in ("weight", "bias"):
            first, second = (layer.get_parameter(f"{module}.{leaf}") for layer in layers(fpi))
            ours, last = (layer.get_parameter(f"{module}.{leaf}") for layer in layers(aki))
            assert torch.equal(ours[:old], first[:old])
            assert torch.equal(ours[old:], second[old:])
            assert torch.equal(last, second)
    norm = "attention.output.LayerNorm.weight"
    assert torch.equal(layers(aki)[0].get_parameter(norm), layers(fpi)[0].get_parameter(norm))
    tables = aki.bert.embeddings.state_dict()
    for name, value in fpi.bert.embeddings.state_dict().items():
        assert torch.equal(tables[name], value), name


def test_net2net_adds_noise_to_the_copies_only_and_the_seed_decides_it() -> None:
    teacher = model("bert")
    grown = []
    for seed in (3, 3, 4):
        student = model("bert", 1, **WIDER)
        grow(teacher, student, "net2net", seed=seed)
        grown.append(student.state_dict())
    name = "bert.encoder.layer.0.attention.self.query.weight"
    assert torch.equal(grown[0][name], grown[1][name])
    assert not torch.equal(grown[0][name], grown[2][name])
    rows = grown[0][name]
    distances = torch.cdist(rows[16:], rows[:16]).min(dim=1).values
    assert (distances > 0).all()
    spread = growth.NET2NET_NOISE * teacher.state_dict()[name].std()
    assert distances.max() < 3 * spread * 48**0.5


def test_net2net_leaves_the_original_channels_as_they_were() -> None:
    teacher, student = grown("bert", "net2net", intermediate_size=40)
    name = "bert.encoder.layer.1.intermediate.dense.weight"
    assert torch.equal(student.state_dict()[name][:24], teacher.state_dict()[name])


def test_net2net_uses_one_map_for_the_whole_residual_stream_and_others_for_each_layer() -> None:
    teacher, student = grown("bert", "net2net", **WIDER)
    ours, theirs = student.state_dict(), teacher.state_dict()

    def origin(name: str) -> list[int]:
        """The teacher's channel whose values each of the student's channels copies."""
        wide, narrow = (state[name].view(-1, state[name].shape[-1]) for state in (ours, theirs))
        return [int((narrow - wide[:, channel : channel + 1]).abs().sum(0).argmin()) for channel in range(48)]

    stream = origin("bert.embeddings.word_embeddings.weight")
    assert stream != [channel % 16 for channel in range(48)]
    for name in ("embeddings.position_embeddings.weight", "encoder.layer.0.attention.output.LayerNorm.weight"):
        assert origin(f"bert.{name}") == stream
    assert origin("bert.encoder.layer.1.output.LayerNorm.bias") == stream
    biases = [ours[f"bert.encoder.layer.{layer}.intermediate.dense.bias"][24:] for layer in range(2)]
    origins = [
        [int((theirs[f"bert.encoder.layer.{layer}.intermediate.dense.bias"] - value).abs().argmin()) for value in bias]
        for layer, bias in enumerate(biases)
    ]
    assert origins[0] != origins[1]


def test_maps_draw_and_count_as_published() -> None:
    robin = round_robin(3, 7)
    assert robin.source.tolist() == [0, 1, 2, 0, 1, 2, 0]
    assert robin.copies.tolist() == [3, 2, 2, 3, 2, 2, 3]
    corner = leading(3, 5)
    assert corner.source.tolist() == [0, 1, 2, -1, -1]
    drawn = random_copies(3, 50, torch.Generator().manual_seed(0))
    assert drawn.source[:3].tolist() == [0, 1, 2]
    assert set(drawn.source.tolist()) == {0, 1, 2}
    assert all(drawn.copies[j] == (drawn.source == drawn.source[j]).sum() for j in range(50))
    heads = round_robin(2, 3).widened(2)
    assert heads.source.tolist() == [0, 1, 2, 3, 0, 1]
    assert heads.copies.tolist() == [2, 2, 1, 1, 2, 2]
    fused = leading(2, 3).stacked(2, 2)
    assert fused.source.tolist() == [0, 1, -1, 2, 3, -1]
    assert fused.added.tolist() == [False, False, True] * 2


def test_a_widened_pair_of_layers_computes_the_same_sums() -> None:
    generator = torch.Generator().manual_seed(0)
    first, second = torch.randn(3, 4, generator=generator), torch.randn(2, 3, generator=generator)
    x = torch.randn(5, 4, generator=generator)
    inner = random_copies(3, 8, generator)
    same_in, same_out = leading(4, 4), leading(2, 2)
    wide_first, wide_second = widen(first, (inner, same_in), None), widen(second, (same_out, inner), 1)
    torch.testing.assert_close((x @ wide_first.T) @ wide_second.T, (x @ first.T) @ second.T)


@pytest.mark.parametrize("method", ["remap", "fna", "fpi"])
def test_rows_the_teacher_lacks_keep_the_students_own_values(method: str) -> None:
    teacher = model("bert")
    wide = {} if method == "remap" else WIDER
    student = model("bert", 1, max_positions=S + 4, **wide)
    own = student.bert.embeddings.position_embeddings.weight.clone()
    grow(teacher, student, method, seed=0)
    ours = student.bert.embeddings.position_embeddings.weight
    assert torch.equal(ours[:S, :16], teacher.bert.embeddings.position_embeddings.weight)
    assert torch.equal(ours[S:], own[S:])


def test_a_student_with_fewer_positions_takes_the_first() -> None:
    teacher, student = grown("bert", "remap", teachers={"max_positions": S + 4})
    rows = teacher.bert.embeddings.position_embeddings.weight[:S]
    assert torch.equal(student.bert.embeddings.position_embeddings.weight, rows)
    assert_same_function(student, teacher, atol=0)


def test_a_padded_vocabulary_loses_only_its_padding() -> None:
    teacher = model("bert")
    expected = logits(teacher)
    teacher.resize_token_embeddings(V + 3)
    teacher.double()
    student = model("bert", 1, **WIDER)
    grow(teacher, student, "fpi", seed=0)
    torch.testing.assert_close(logits(student), expected, rtol=0, atol=1e-10)


def test_a_teacher_in_another_precision_is_read_into_the_students() -> None:
    teacher, student = model("bert").bfloat16(), model("bert", 1).float()
    grow(teacher, student, "remap", seed=0)
    assert student.dtype == torch.float32
    name = "bert.encoder.layer.0.intermediate.dense.weight"
    assert torch.equal(student.state_dict()[name], teacher.state_dict()[name].float())


@pytest.mark.slow
def test_the_first_loss_of_a_grown_student_on_real_text() -> None:
    """A small teacher learns the letters of Python's own documentation, well past their frequencies.

    ModernBERT's rotary positions let it do so in seconds; learned positions take far longer to leave the frequencies.
    """
    letters = "abcdefghijklmnopqrstuvwxyz "
    text = re.sub(r"\s+", " ", " ".join(pydoc_data.topics.topics.values()).lower())
    tokens = torch.tensor([5 + letters.find(letter) for letter in text])  # 4: any other sign
    rows = tokens[: len(tokens) // 32 * 32].view(-1, 32)
    held_out, training = rows[-64:], rows[:-64]
    data = {"vocab_size": 32, "seq_len": 32, "pad_token_id": 0}
    sizes = {"layers": 2, "hidden_size": 32, "num_heads": 2, "intermediate_size": 64, "max_positions": 32, "dropout": 0}
    sizes |= {"family": "modernbert", "config": {"local_attention": 8}}

    def loss(of: PreTrainedModel, batch: torch.Tensor, seed: int) -> torch.Tensor:
        hidden = torch.rand(batch.shape, generator=torch.Generator().manual_seed(seed)) < 0.15
        shown = of(input_ids=batch.masked_fill(hidden, 3)).logits[hidden]
        return functional.cross_entropy(shown, batch[hidden])

    torch.manual_seed(0)
    teacher = build_student(StudentConfig(**sizes), **data)
    optimizer = torch.optim.AdamW(teacher.parameters(), lr=3e-3)
    for step in range(300):
        at = torch.randint(len(training), (32,), generator=torch.Generator().manual_seed(step))
        loss(teacher, training[at], step).backward()
        optimizer.step()
        optimizer.zero_grad()

    def first_loss(method: str, **changes: int) -> float:
        torch.manual_seed(1)
        student = build_student(StudentConfig(**{**sizes, **changes}), **data)
        if method != "random":
            grow(teacher, student, method, seed=0)
        with torch.no_grad():
            return loss(student, held_out, -1).item()

    with torch.no_grad():
        of_teacher = loss(teacher, held_out, -1).item()
    shares = torch.bincount(tokens) / len(tokens)
    of_frequencies = -(shares[shares > 0] * shares[shares > 0].log()).sum().item()
    assert of_teacher < of_frequencies - 0.3
    assert of_teacher < first_loss("remap", layers=3) < of_frequencies - 0.1
    assert first_loss("random", layers=3) > of_frequencies
    wide = {"hidden_size": 64, "num_heads": 4, "intermediate_size": 128}
    assert first_loss("fpi", **wide) == pytest.approx(of_teacher, abs=1e-4)
    assert of_teacher < first_loss("fna", **wide) < of_frequencies


@pytest.mark.parametrize("family", ["bert", "modernbert", "electra"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("method", ["stack", "fpi"])
def test_a_teacher_with_another_vocabulary_gives_the_entries_that_both_have(
    family: str, tied: bool, method: str
) -> None:
    """As if the teacher had the student's vocabulary, with the student's own rows for what it does not know."""
    config = {"tie_word_embeddings": tied}
    teacher, student = model(family, config=config), model(family, 1, layers=4, config=config)
    expected = copy.deepcopy(student)
    entries = torch.full((V,), -1)
    entries[7:40] = torch.randperm(V, generator=torch.Generator().manual_seed(2))[:33]
    translated = copy.deepcopy(teacher)
    with torch.no_grad():
        for theirs in translated.parameters():
            if theirs.shape[0] == V:
                theirs.copy_(theirs[entries.clamp(min=0)])
    before = copy.deepcopy(student)
    grow(translated, expected, method, seed=0)
    grow(teacher, student, method, seed=0, entries=entries)
    wanted = dict(expected.named_parameters())
    for (name, found), own in zip(student.named_parameters(), before.parameters(), strict=True):
        if found.shape[0] == V:
            assert torch.equal(found[entries < 0], own[entries < 0]), name
            assert torch.equal(found[entries >= 0], wanted[name][entries >= 0]), name
        else:
            assert torch.equal(found, wanted[name]), name


@pytest.mark.parametrize("pad", [0, 3])
def test_positions_after_the_padding_of_another_vocabulary_are_the_teachers(pad: int) -> None:
    """RoBERTa's first position is the one after the padding's id."""
    teacher, student = model("roberta"), model("roberta", 1, pad=pad, layers=4)
    before = student.base_model.embeddings.position_embeddings.weight.clone()
    grow(teacher, student, "stack", seed=0, entries=torch.arange(V))
    theirs, ours = (each.base_model.embeddings.position_embeddings.weight for each in (teacher, student))
    assert torch.equal(ours[pad + 1 :], theirs[2:])
    assert torch.equal(ours[: max(pad - 1, 0)], before[: max(pad - 1, 0)])
