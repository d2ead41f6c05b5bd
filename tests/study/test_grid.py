from __future__ import annotations

import itertools
import re
from pathlib import Path

import pytest
import yaml
from harness.errors import error_of

from dwt_ds.cli.main import main
from dwt_ds.config.recipe import load_recipe, parse_run_config
from dwt_ds.config.schema import RunConfig
from dwt_ds.models.growth.plan import parse_method
from dwt_ds.study.folder import StudyFolder
from dwt_ds.study.grid import SCALES, StudyRun, grid_names, grid_questions, load_grid
from dwt_ds.study.run import default_folder


def write(tmp_path: Path, grid: object) -> str:
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(grid, sort_keys=False), encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("name", grid_names())
def test_every_packaged_grid_makes_sound_recipes_at_every_scale(name: str, scale: str) -> None:
    grid = load_grid(name, scale)
    assert len({run.name for run in grid.runs}) == len(grid.runs)
    seen: set[str] = set()
    for run in grid.runs:
        assert run.teacher_run is None or run.teacher_run in seen, "a teacher comes first"
        seen.add(run.name)
        settings = {key: value for key, value in run.settings.items() if key != "base"}
        init = parse_run_config(settings).student.init
        assert init == "random" or parse_method(init)
        assert init == "random" or run.teacher_run is not None


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("name", grid_names())
def test_no_two_runs_of_a_packaged_grid_are_the_same(name: str, scale: str, tmp_path: Path) -> None:
    folder, same = StudyFolder(tmp_path), dict[str, str]()
    for run in load_grid(name, scale).runs:
        recipe = load_recipe(str(folder.write_recipe(run, folder.recipe(run.name))))
        settings = repr({**recipe.config.to_dict(), "output_dir": None})
        assert same.setdefault(settings, run.name) == run.name


def test_a_rate_is_the_one_that_its_label_says(tmp_path: Path) -> None:
    folder = StudyFolder(tmp_path)
    for name, scale in itertools.product(("fair", "tuned"), ("small", "paper")):
        for run in load_grid(name, scale).runs:
            if "rate" in run.labels:
                recipe = load_recipe(str(folder.write_recipe(run, folder.recipe(run.name))))
                assert recipe.config.train.learning_rate == float(run.labels["rate"].removeprefix("lr"))


def test_the_packaged_grids_are_the_documented_ones(capsys: pytest.CaptureFixture[str]) -> None:
    docs = (Path(__file__).parents[2] / "docs" / "study.md").read_text(encoding="utf-8")
    documented = re.findall(r"^\| `(\w+)` \| ([^|]*\?) \|", docs, re.MULTILINE)
    assert dict(documented) == grid_questions()
    assert list(grid_questions()) == grid_names()
    with pytest.raises(SystemExit):
        main(["study", "--help"])
    printed = capsys.readouterr().out
    assert all(question in printed for question in grid_questions().values())


def test_settings_at_one_scale_get_a_folder_of_their_own(tmp_path: Path) -> None:
    long = write(tmp_path, {"settings_at": {"small": {"train": {"max_steps": 7}}}, "runs": [{"teacher": "teacher1"}]})
    small, smoke = load_grid(long, "small"), load_grid(long, "smoke")
    assert {run.settings["train"]["max_steps"] for run in small.runs} == {7}, "the teacher's as well"
    assert {run.settings["train"]["max_steps"] for run in smoke.runs} == {12}
    assert small.runs[0].settings["train"]["micro_batch_size"] == 8, "the scale's"
    assert (default_folder(small), default_folder(smoke)) == (Path("runs/study/small_mine"), Path("runs/study/smoke"))
    everywhere = write(tmp_path, {"settings": {"train": {"max_steps": 7}}, "runs": [{"teacher": "none"}]})
    assert default_folder(load_grid(everywhere, "smoke")) == Path("runs/study/smoke_mine")
    assert {run.settings["train"]["max_steps"] for run in load_grid("longer", "small").runs} == {10_000}


def test_the_documented_grid_says_what_it_means(tmp_path: Path) -> None:
    docs = (Path(__file__).parents[2] / "docs" / "study.md").read_text(encoding="utf-8")
    example = re.search(r"## A grid of your own\n\n```yaml\n(.*?)```", docs, re.DOTALL)
    assert example
    (tmp_path / "mine.yaml").write_text(example[1], encoding="utf-8")
    folder, epochs = StudyFolder(tmp_path), RunConfig().train.epochs
    for scale, length in (("small", (2000, epochs)), ("paper", (None, 5.0))):
        grid = load_grid(str(tmp_path / "mine.yaml"), scale)
        recipes = [load_recipe(str(folder.write_recipe(run, folder.recipe(run.name)))) for run in grid.runs]
        assert {(recipe.config.train.max_steps, recipe.config.train.epochs) for recipe in recipes} == {length}


def test_both_sides_have_every_rate_and_teachers_the_scales() -> None:
    rates = {run.name: run.settings["train"]["learning_rate"] for run in load_grid("fair", "small", [1]).runs}
    ours = dict(zip(("-lr5e-4", "", "-lr2e-3", "-lr4e-3"), (5e-4, 1e-3, 2e-3, 4e-3)))
    students = ("alone", "with_teacher4-adaptive4", "with_teacher1-adaptive4")
    assert rates == {
        **{"teacher4-s42": 1e-3, "teacher1-s42": 1e-3},
        **{f"{student}{label}-s1": rate for student in students for label, rate in ours.items()},
    }


def test_a_grid_may_have_a_teacher_for_each_seed(tmp_path: Path) -> None:
    content = {"teacher_for_each_seed": True, "runs": [{"teacher": "teacher4"}], "seeds": [1, 2]}
    grid = load_grid(write(tmp_path, content), "smoke")
    assert [(run.name, run.seed, run.teacher_run) for run in grid.runs] == [
        ("teacher4-s1", 1, None),
        ("teacher4-s2", 2, None),
        ("with_teacher4-s1", 1, "teacher4-s1"),
        ("with_teacher4-s2", 2, "teacher4-s2"),
    ]
    # A run of that name has the first seed's teacher in other grids.
    assert default_folder(grid) == Path("runs/study/smoke_mine")


def test_seeds_that_are_added_later_have_the_same_teacher(tmp_path: Path) -> None:
    """Of the scale; or of the grid, if that has seeds."""
    for seeds, teacher in (([], "teacher4-s42"), ([7, 8], "teacher4-s7")):
        grid = write(tmp_path, {"runs": [{"teacher": "teacher4"}], "seeds": seeds})
        for asked in ([42], [43, 44]):
            names = [run.name for run in load_grid(grid, "small", asked).runs]
            assert names == [teacher, *(f"with_teacher4-s{seed}" for seed in asked)]


def test_growth_and_distillation_are_tried_alone_and_together() -> None:
    names = [run.name for run in load_grid("grow", "small", [1]).runs]
    for start in ("stack", "interlace", "remap"):
        assert {f"with_teacher4-w0-{start}-s1", f"with_teacher4-adaptive4-{start}-s1"} <= set(names)
    assert {"alone-s1", "with_teacher4-adaptive4-s1", "with_narrow4-adaptive4-s1"} <= set(names)


def test_a_block_is_a_product_and_defaults_are_left_out_of_names(tmp_path: Path) -> None:
    runs = [{"teacher": "none"}, {"teacher": ["teacher2", "teacher1"], "weight": ["w1", "4to1"], "temperature": "t2"}]
    grid = load_grid(write(tmp_path, {"runs": runs, "seeds": [1, 2]}), "smoke")
    assert [run.name for run in grid.runs] == [
        "teacher2-s1",
        "teacher1-s1",
        "alone-s1",
        "alone-s2",
        *(f"with_{t}{w}-t2-s{s}" for t in ("teacher2", "teacher1") for w in ("", "-4to1") for s in (1, 2)),
    ]
    last = grid.runs[-1]
    named = {"teacher": "teacher1", "weight": "4to1", "temperature": "t2", "start": "random"}
    assert last.labels == {**last.labels, **named}
    assert last.settings["distill"]["soft_weight"] == {"schedule": "linear", "start": 4.0, "end": 1.0}
    assert last.settings["distill"]["temperature"] == 2.0
    # One teacher for all seeds.
    assert (last.seed, last.teacher_run) == (2, "teacher1-s1")
    teacher = grid.runs[1]
    assert teacher.labels == {"makes": "teacher1"}
    assert teacher.settings["student"]["layers"] == 1
    assert teacher.settings["student"]["hidden_size"] == last.settings["student"]["hidden_size"] == 32


def test_a_grid_may_bring_labels_and_axes_of_its_own(tmp_path: Path) -> None:
    content = {
        "settings": {"train": {"max_steps": 7}},
        "teachers": {"thin": {"student": {"hidden_size": 16, "num_heads": 1}}},
        "axes": {
            "weight": {"w9": {"distill": {"soft_weight": 9}}},
            "rate": {"slow": {}, "fast": {"train": {"learning_rate": 0.1}}},
        },
        "runs": [{"teacher": "thin", "weight": "w9", "rate": ["slow", "fast"]}],
    }
    grid = load_grid(write(tmp_path, content), "smoke", seeds=[5])
    assert [run.name for run in grid.runs] == ["thin-s42", "with_thin-w9-s5", "with_thin-w9-fast-s5"]
    assert grid.runs[2].settings["train"]["learning_rate"] == 0.1
    assert all(run.settings["train"]["max_steps"] == 7 for run in grid.runs)


def test_what_a_block_says_is_above_the_grids_settings_and_defaults_are_below(tmp_path: Path) -> None:
    content = {
        "settings": {"distill": {"soft_weight": 5.0, "temperature": 2.0}, "student": {"init": "stack"}},
        "runs": [{"teacher": "teacher2"}, {"teacher": "teacher2", "weight": "4to1", "start": "random"}],
    }
    grid = load_grid(write(tmp_path, content), "smoke")
    _, plain, said = grid.runs
    assert (plain.settings["distill"], plain.settings["student"]["init"]) == (
        {"soft_weight": 5.0, "temperature": 2.0},
        "stack",
    )
    assert said.settings["distill"]["soft_weight"]["start"] == 4.0
    assert said.settings["distill"]["temperature"] == 2.0
    assert said.settings["student"]["init"] == "random"


def test_a_label_of_the_grids_own_replaces_a_packaged_one(tmp_path: Path) -> None:
    own = {"teacher": {"release_after_steps": 7}}
    content = {
        "axes": {"release": {"until_quarter": own}},
        "runs": [{"teacher": "teacher2", "release": "until_quarter"}],
    }
    assert load_grid(write(tmp_path, content), "smoke").runs[1].settings["teacher"] == own["teacher"]


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        (
            {
                "axes": {
                    "depth": {"d6": {}, "big": {"student": {"layers": 9}}},
                    "width": {"n": {}, "big": {"student": {"hidden_size": 64}}},
                },
                "runs": [{"teacher": "none", "depth": "big"}, {"teacher": "none", "width": "big"}],
            },
            "two runs with different settings would be called 'alone-big-s42'; give labels of different axes",
        ),
        ({"run": []}, "run: unknown key; did you mean 'runs'"),
        ({"runs": []}, "runs is empty"),
        ({"glue": "hub", "runs": [{"teacher": "none"}]}, "glue='hub' must be a mapping of options, such as"),
        ({"seeds": 42, "runs": [{"teacher": "none"}]}, "seeds=42: must be a list"),
        ({"seeds": [42, "x"], "runs": [{"teacher": "none"}]}, "seeds='x': must be a whole number"),
        ({"settings_at": {"smal": {}}, "runs": []}, "settings_at.smal"),
        ({"settings": 3, "runs": [{"teacher": "none"}]}, "settings=3: must be a mapping"),
        ({"teachers": ["a"], "runs": [{"teacher": "none"}]}, "teachers=['a']: must be a mapping"),
        ({"axes": {"weight": ["w1"]}, "runs": [{"teacher": "none"}]}, "axes.weight=['w1']: must be a mapping"),
        ({"axes": {"weight": {"w1": 3}}, "runs": [{"teacher": "none"}]}, "axes.weight.w1=3: must be a mapping"),
        ({"runs": 5}, "runs=5: must be a list"),
        ({"runs": ["alone"]}, "'alone' must be a mapping with a teacher"),
        ({"runs": [{"teacher": "teacher9"}]}, "teacher='teacher9' is unknown"),
        ({"runs": [{"teacher": "none", "wieght": "w1"}]}, "wieght: unknown axis; did you mean 'weight'"),
        ({"runs": [{"teacher": "teacher1", "weight": "4 to 1"}]}, "weight='4 to 1' is unknown; did you mean '4to1'"),
    ],
)
def test_a_mistake_is_an_error_of_one_line(grid: object, message: str, tmp_path: Path) -> None:
    error = error_of(load_grid, write(tmp_path, grid), "smoke")
    assert re.search(r"grid .*mine\.yaml", error)
    assert message in error


def test_a_labels_schedule_keeps_nothing_of_the_grids_own(tmp_path: Path) -> None:
    own = {"schedule": "linear", "start": 2.0, "end": 0.5, "span": 0.5}
    grid = {
        "settings": {"distill": {"soft_weight": own}},
        "axes": {"weight": {"slow": {"distill": {"soft_weight": {"average_steps": 99}}}}},
        "runs": [{"teacher": "teacher1", "weight": ["adaptive", "1to0", "slow"]}],
    }
    weights = {run.labels["weight"]: run.settings["distill"]["soft_weight"] for run in students(write(tmp_path, grid))}
    assert weights["adaptive"] == {"schedule": "adaptive", "start": 1.0}
    assert weights["1to0"] == {"schedule": "linear", "start": 1.0, "end": 0.0}
    assert weights["slow"] == {**own, "average_steps": 99}, "a label that is no schedule changes the grid's own"


def test_a_grid_whose_students_start_from_their_teacher(tmp_path: Path) -> None:
    """Not so the teachers, and the students without one."""
    grid = {"settings": {"student": {"init": "stack"}}, "runs": [{"teacher": ["none", "teacher1"]}]}
    runs = load_grid(write(tmp_path, grid), "smoke").runs
    starts = {run.name.rpartition("-")[0]: run.settings["student"]["init"] for run in runs}
    assert starts == {"teacher1": "random", "alone": "random", "with_teacher1": "stack"}


def students(grid: str) -> list[StudyRun]:
    return [run for run in load_grid(grid, "smoke").runs if run.teacher_run]


def test_an_unknown_grid_names_the_packaged_ones() -> None:
    with pytest.raises(FileNotFoundError, match="did you mean 'teacher_quality'"):
        load_grid("teacher_qality", "smoke")


def test_fine_tuning_is_asked_for_by_the_grid_or_the_caller(tmp_path: Path) -> None:
    alone = {"runs": [{"teacher": "none"}]}
    grid = write(tmp_path, alone)
    assert load_grid(grid, "paper").glue is None
    assert load_grid(grid, "paper", glue="tsv").glue == {"dir": "tsv"}
    assert load_grid(write(tmp_path, {**alone, "glue": {}}), "paper").glue == {}  # all defaults
    grid = write(tmp_path, {**alone, "glue": {"dir": "mine", "seeds": 2}})
    assert load_grid(grid, "smoke").glue == {"dir": "mine", "seeds": 2, "max_train_rows": 32, "max_steps": 2}
    assert load_grid(grid, "paper", glue="hub").glue == {"dir": "hub", "seeds": 2}


def test_a_teacher_with_its_own_vocabulary_is_not_evaluated_on_the_grids_sets(tmp_path: Path) -> None:
    """Theirs is the student's."""
    grid = tmp_path / "mine.yaml"
    grid.write_text(
        "settings: {train: {eval_sets: {books: data/books}}}\nruns: [{teacher: own4}, {teacher: teacher4}]\n"
    )
    for scale in ("smoke", "small", "paper"):
        sets = {run.name: run.settings["train"]["eval_sets"] for run in load_grid(str(grid), scale, [1]).runs}
        books = {"books": "data/books"}
        assert sets == {"own4-s42": None, "teacher4-s42": books, "with_own4-s1": books, "with_teacher4-s1": books}
