"""Recipes: those that come with the project, their bases, and what is wrong in one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from harness.errors import error_of, one_line

from dwt_ds.config.objective import Schedule
from dwt_ds.config.recipe import find_recipe, load_recipe, recipe_names
from dwt_ds.config.schema import RunConfig

PUBLIC_RECIPES = {
    "quickstart",
    "quickstart_teacher",
    "paper_alone",
    "paper_weak",
    "paper_weak_h100",
    "paper_very_weak",
    "paper_extremely_weak",
    "paper_teacher_4",
    "paper_teacher_2",
    "paper_teacher_1",
    "paper_adaptive",
    "paper_grown",
    "paper_strong",
    "paper_decay",
    "paper_remap",
    "paper_lamb",
    "large",
}
Write = Callable[..., str]


# Packaged recipes.


def test_the_packaged_recipes_are_the_promised_ones() -> None:
    assert set(recipe_names()) == PUBLIC_RECIPES


@pytest.mark.parametrize("name", sorted(PUBLIC_RECIPES))
def test_every_packaged_recipe_loads_and_loads_again_from_what_a_run_saves(name: str, write: Write) -> None:
    recipe = load_recipe(name)
    assert recipe.name == name
    train = recipe.config.train
    assert (train.max_steps is None) != (train.epochs is None)
    saved = write(yaml.safe_dump(recipe.config.to_dict(), sort_keys=False), "config")
    assert load_recipe(saved).config == recipe.config


def test_no_two_packaged_recipes_share_an_output_folder() -> None:
    folders = [load_recipe(name).config.output_dir for name in recipe_names()]
    assert len(set(folders)) == len(folders)


@pytest.mark.parametrize("name", sorted(name for name in PUBLIC_RECIPES - {"paper_lamb"} if name.startswith("paper_")))
def test_paper_recipes_have_the_numbers_of_the_paper(name: str) -> None:
    config = load_recipe(name).config
    train, student = config.train, config.student
    assert (student.family, student.hidden_size, student.num_heads) == ("bert", 768, 12)
    assert train.learning_rate == 5e-4
    assert train.warmup_ratio == 0.05
    assert train.epochs == (4 if name == "paper_grown" else 20)
    assert train.max_steps is None
    assert train.expected_world_size == (1 if name == "paper_weak_h100" else None)
    ranks = train.expected_world_size or 8
    assert (train.micro_batch_size * ranks, train.gradient_accumulation_steps) == (128, 1)
    assert train.weight_decay == 0.0
    assert (config.data.mask_probability, config.data.mask_share, config.data.random_share) == (0.15, 0.8, 0.1)
    assert config.distill.hard_weight == 1.0
    assert config.distill.temperature == Schedule("constant", 1.0)
    assert config.distill.soft_positions == "labelled"
    assert config.distill.temperature_squared is False
    assert config.deepspeed_config == "zero2_bf16"


def test_the_lamb_recipe_is_the_weak_one_at_8192_rows_with_the_numbers_of_lambs_paper() -> None:
    """You et al. (2020), table 4: the rate 5 / (2^1 x 10^3), warm-up over a twentieth of the steps."""
    config, weak = load_recipe("paper_lamb").config, load_recipe("paper_weak").config
    train = config.train
    assert (config.student, config.teacher, config.distill) == (weak.student, weak.teacher, weak.distill)
    assert train.micro_batch_size * train.gradient_accumulation_steps * 8 == 8192
    assert (train.learning_rate, train.warmup_ratio, train.weight_decay) == (5 / 2000, 1 / 20, 0.01)
    assert (train.epochs, train.max_steps) == (20, None)
    assert (config.deepspeed_config, config.deepspeed["optimizer"]["type"]) == ("zero0", "Lamb")


@pytest.mark.parametrize(
    ("name", "layers", "teacher", "soft_weight", "init"),
    [
        ("paper_alone", 6, None, Schedule(), "random"),
        ("paper_teacher_4", 4, None, Schedule(), "random"),
        ("paper_teacher_2", 2, None, Schedule(), "random"),
        ("paper_teacher_1", 1, None, Schedule(), "random"),
        ("paper_weak", 6, "paper_teacher_4", Schedule("constant", 1.0), "random"),
        ("paper_weak_h100", 6, "paper_teacher_4", Schedule("constant", 1.0), "random"),
        ("paper_very_weak", 6, "paper_teacher_2", Schedule("constant", 1.0), "random"),
        ("paper_extremely_weak", 6, "paper_teacher_1", Schedule("constant", 1.0), "random"),
        ("paper_adaptive", 6, "paper_teacher_4", Schedule("adaptive", 4.0), "random"),
        ("paper_grown", 6, "paper_teacher_4", Schedule("adaptive", 4.0), "stack"),
        ("paper_strong", 6, "paper_teacher_4", Schedule("constant", 4.0), "random"),
        ("paper_decay", 6, "paper_teacher_4", Schedule("linear", 4.0, 1.0), "random"),
        ("paper_remap", 6, "paper_teacher_4", Schedule("constant", 1.0), "remap"),
    ],
)
def test_what_sets_the_paper_recipes_apart(
    name: str, layers: int, teacher: str | None, soft_weight: Schedule, init: str
) -> None:
    config = load_recipe(name).config
    assert config.student.layers == layers
    assert config.student.init == init
    assert config.distill.soft_weight == soft_weight
    # The teacher is what the teacher's own recipe exports.
    assert config.teacher.path == (f"{load_recipe(teacher).config.output_dir}/export" if teacher else None)


def test_the_large_recipe_is_24_x_1024_with_a_teacher() -> None:
    config = load_recipe("large").config
    assert (config.student.layers, config.student.hidden_size, config.student.num_heads) == (24, 1024, 16)
    assert config.teacher.path is not None


# Finding a recipe.


def test_a_recipe_is_a_path_or_a_packaged_name(write: Write) -> None:
    path = write("output_dir: here\n", "paper_weak")
    assert load_recipe(path).config.output_dir == "here"
    assert load_recipe("paper_weak").config.output_dir == "runs/paper/weak"


def test_a_missing_recipe_is_reported_with_the_nearest_name_and_the_list() -> None:
    with pytest.raises(FileNotFoundError) as caught:
        find_recipe("paper_weka")
    message = one_line(caught.value)
    assert message.startswith("recipe 'paper_weka': no such file")
    assert "did you mean 'paper_weak'?" in message
    assert "quickstart" in message


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"train: [\n", "cannot be read as YAML"),
        (b"\xff\xfe\x00", "cannot be read as YAML"),
        (b"", "holds NoneType, not a mapping of settings"),
        (b"train: {max_steps: 1, max_steps: 2}\n", "duplicate key 'max_steps'"),
    ],
)
def test_an_unreadable_recipe_is_reported_in_one_line_with_its_path(content: bytes, words: str, tmp_path: Path) -> None:
    path = tmp_path / "broken.yaml"
    path.write_bytes(content)
    error = error_of(load_recipe, str(path))
    assert error.startswith(f"recipe {path}: ")
    assert words in error


def test_the_word_off_is_a_word(write: Write) -> None:
    """YAML reads it as false."""
    train = load_recipe(write("train: {compile: off, cuda_graphs: off}\n")).config.train
    assert (train.compile, train.cuda_graphs) == ("off", "off")


@pytest.mark.parametrize(
    ("text", "value"), [("5e-4", 5e-4), ("5.0e-4", 5e-4), ("'5e-4'", 5e-4), ("1E-3", 1e-3), ("1", 1.0)]
)
def test_numbers_with_an_exponent_are_numbers(text: str, value: float, write: Write) -> None:
    assert load_recipe(write(f"train: {{learning_rate: {text}}}\n")).config.train.learning_rate == value
    assert load_recipe(write("{}\n"), [f"train.learning_rate={text}"]).config.train.learning_rate == value


def test_a_number_with_an_exponent_is_one_in_the_deepspeed_mapping_too(write: Write) -> None:
    config = load_recipe(write("deepspeed: {gradient_clipping: 1e-1}\n"), ["deepspeed.optimizer.params.lr=5e-4"]).config
    assert config.deepspeed == {"gradient_clipping": 0.1, "optimizer": {"params": {"lr": 5e-4}}}


# Bases.


def test_a_base_is_laid_under_key_by_key(write: Write) -> None:
    write("seed: 1\ntrain: {max_steps: 5, log_every: 3}\nstudent: {config: {a: 1, b: {c: 2, d: 3}}}\n", "below")
    top = write("base: below\ntrain: {max_steps: 6}\nstudent: {config: {b: {c: 4}}}\n", "top")
    recipe = load_recipe(top)
    assert (recipe.config.seed, recipe.config.train.max_steps, recipe.config.train.log_every) == (1, 6, 3)
    assert recipe.config.student.config == {"a": 1, "b": {"c": 4, "d": 3}}
    assert {"seed", "train.max_steps", "train.log_every", "student.config.b.d"} <= recipe.written
    assert "base" not in recipe.written


def test_a_mapping_and_a_number_replace_each_other(write: Write) -> None:
    write("distill: {soft_weight: 2, temperature: {schedule: linear, start: 4, end: 1}}\n", "below")
    top = write("base: below\ndistill: {soft_weight: {schedule: linear, start: 3, end: 1}, temperature: 2}\n", "top")
    distill = load_recipe(top).config.distill
    assert distill.soft_weight == Schedule("linear", 3.0, 1.0)
    assert distill.temperature == Schedule("constant", 2.0)


@pytest.mark.parametrize("base", ["below", "deep/below.yaml", "deep/below", "quickstart"])
def test_a_base_is_found_beside_its_child_from_any_folder(
    base: str, write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before one of that name in the folder of the call, or a packaged one."""
    write("seed: 7\n", base.removesuffix(".yaml"))
    top = write(f"base: {base}\n", "top")
    write("seed: 8\n", f"elsewhere/{base.removesuffix('.yaml')}")
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert load_recipe(top).config.seed == 7


def test_a_base_may_be_a_packaged_recipe(write: Write) -> None:
    recipe = load_recipe(write("base: paper_decay\nseed: 3\n"))
    assert recipe.config.distill.soft_weight == Schedule("linear", 4.0, 1.0)
    assert recipe.config.seed == 3


@pytest.mark.parametrize("names", [["a"], ["a", "b"], ["a", "b", "c"]])
def test_a_loop_of_bases_is_an_error(names: list[str], write: Write) -> None:
    for name, base in zip(names, [*names[1:], names[0]]):
        path = write(f"base: {base}\n", name)
    assert "names itself through its bases; remove the loop" in error_of(load_recipe, path)


def test_a_missing_base_is_reported_with_the_recipe_that_names_it(write: Write) -> None:
    path = write("base: paper_weka\n")
    with pytest.raises(FileNotFoundError, match="did you mean 'paper_weak'") as caught:
        load_recipe(path)
    assert one_line(caught.value).startswith(f"base of {path}: recipe 'paper_weka': no such file")


# Unknown keys.


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("max_step=3", "max_step: unknown key; did you mean 'train.max_steps'?"),
        ("trian.max_steps=3", "trian: unknown key; did you mean 'train'?"),
        ("output-dir=3", "output-dir: unknown key; did you mean 'output_dir'?"),
        ("train.max_stepz=3", "train.max_stepz: unknown key; did you mean 'max_steps'?"),
        ("student.num_layers=3", "student.num_layers: unknown key; did you mean 'layers'?"),
        ("teacher.paht=x", "teacher.paht: unknown key; did you mean 'path'?"),
        ("data.directory=x", "data.directory: unknown key; did you mean 'dir'?"),
        ("distill.softweight=1", "distill.softweight: unknown key; did you mean 'soft_weight'?"),
        ("distill.soft_weight.shedule=linear", "distill.soft_weight.shedule: unknown key; did you mean 'schedule'?"),
        ("distill.temperature.span_step=1", "distill.temperature.span_step: unknown key; did you mean 'span_steps'?"),
        ("zzzzzz=1", "zzzzzz: unknown key"),
    ],
)
def test_an_unknown_key_is_reported_with_the_nearest_name(override: str, message: str, write: Write) -> None:
    assert error_of(load_recipe, write("{}\n"), [override]) == message


def test_unknown_keys_inside_a_recipe_or_its_base_are_found(write: Write) -> None:
    write("student: {num_hidden_layers: 3}\n", "below")
    with pytest.raises(ValueError, match=r"^student.num_hidden_layers: unknown key"):
        load_recipe(write("base: below\n", "top"))
    with pytest.raises(ValueError, match=r"^1: unknown key$"):
        load_recipe(write("1: 2\n"))
    with pytest.raises(ValueError, match=r"^train.log_every: unknown key; in a file, write log_every under train$"):
        load_recipe(write("train.log_every: 2\n"))
    with pytest.raises(
        ValueError, match=r"did you mean 'distill.soft_weight.schedule' or 'distill.temperature.schedule'\?$"
    ):
        load_recipe(write("distill: {schedule: linear}\n"))


def test_an_empty_recipe_is_the_defaults(write: Write) -> None:
    recipe = load_recipe(write("{}\n"))
    assert recipe.config == RunConfig()
    assert recipe.written == frozenset()
