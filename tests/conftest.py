"""What tests of whole runs share: a tiny text, the data folder made of it, a tiny teacher, and the launcher."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml
from hypothesis import HealthCheck, settings
from torch.distributed.elastic.utils.distributed import get_free_port

from dwt_ds.data.prepared import PreparedData
from dwt_ds.engine.extension_locks import find_locks
from dwt_ds.prepare.options import PrepareOptions
from dwt_ds.prepare.pipeline import prepare
from dwt_ds.prepare.reading import LocalFile
from dwt_ds.prepare.sources import RecordForm

# DeepSpeed compiles its operators at its first start on a machine.
FIRST_START_SECONDS = 300.0
ON_CPU = {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}

# This environment's programs come first in whatever a test starts. DeepSpeed's operators are compiled anew whenever
# another version of ninja looks at them, so all have to find the same one.
PROGRAMS = Path(sys.executable).parent
os.environ["PATH"] = f"{PROGRAMS}{os.pathsep}{os.environ['PATH']}"

# Operators compiled by another environment would be compiled anew, and a build killed there would stop tests here.
os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(PROGRAMS.parent / "torch_extensions"))
for lock in find_locks():
    if not lock.held:
        Path(lock.path).unlink(missing_ok=True)  # the other worker may have been faster

# A busy machine is no fault of an example's.
settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("untimed")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest first, so that while one worker is at them the other has the rest to do."""

    def allowed_seconds(item: pytest.Item) -> float:
        mark = item.get_closest_marker("timeout")
        return float(mark.args[0]) if mark else 0.0

    items.sort(key=allowed_seconds, reverse=True)


@pytest.fixture(scope="session")
def tiny_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """320 short documents of invented words, some 9,500 words; subject, verb and object go together, so there is
    something to learn."""
    draw = random.Random(11)
    nouns, verbs = _invented_words()
    documents = []
    for _ in range(320):
        sentences = []
        for _ in range(3 + int(draw.random() * 5)):
            subject = int(len(nouns) * draw.random() ** 2)
            verb = verbs[subject % len(verbs)]
            object_ = nouns[(subject + 1 + int(3 * draw.random())) % len(nouns)]
            sentences.append(f"the {nouns[subject]} {verb} the {object_} .")
        documents.append(" ".join(sentences))
    path = tmp_path_factory.mktemp("text") / "tiny.txt"
    path.write_text("\n\n".join(documents) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def tiny_vocabulary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A vocab.txt of BERT's special tokens, the letters with and without "##", and every word of `tiny_text`."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    nouns, verbs = _invented_words()
    entries = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", ".", *letters, *(f"##{letter}" for letter in letters)]
    path = tmp_path_factory.mktemp("vocabulary") / "vocab.txt"
    path.write_text("\n".join([*entries, "the", *nouns, *verbs]) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory, tiny_text: Path, tiny_vocabulary: Path) -> Path:
    """A prepared data folder: rows of 32 tokens, a vocabulary of 298. Read only: all tests of a session share it."""
    from dwt_ds.cli.main import main

    folder = tmp_path_factory.mktemp("data") / "tiny"
    arguments = f"prepare --text {tiny_text} --tokenizer {tiny_vocabulary} --out {folder} --seq-len 32 --workers 1"
    assert main([*arguments.split(), "--validation", "0.1"]) == 0
    return folder


@pytest.fixture(scope="session")
def sentence_data(tmp_path_factory: pytest.TempPathFactory, tiny_text: Path, tiny_vocabulary: Path) -> Path:
    """As `tiny_data`, but with a sentence a row, and nothing held out."""
    from dwt_ds.cli.main import main

    folder = tmp_path_factory.mktemp("data") / "sentences"
    arguments = f"prepare --text {tiny_text} --tokenizer {tiny_vocabulary} --out {folder} --seq-len 32 --workers 1"
    assert main([*arguments.split(), "--validation", "0", "--one-sentence-per-row"]) == 0
    return folder


@pytest.fixture(scope="session")
def tiny_teacher(tmp_path_factory: pytest.TempPathFactory, tiny_data: Path) -> Path:
    """A random BERT of 1 layer x 16 with the tokenizer of `tiny_data`, in Hugging Face format."""
    import torch
    from transformers import AutoTokenizer, BertConfig, BertForMaskedLM

    tokenizer = AutoTokenizer.from_pretrained(tiny_data / "tokenizer")
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=32,
        pad_token_id=tokenizer.pad_token_id,
        initializer_range=0.3,
    )
    folder = tmp_path_factory.mktemp("teacher") / "tiny"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        BertForMaskedLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_recipe(tmp_path_factory: pytest.TempPathFactory, tiny_data: Path, tiny_teacher: Path) -> Path:
    """A recipe over `tiny_data` and `tiny_teacher`: a student of 2 layers x 32, four steps of 4 rows a rank in fp32.
    Give it an `output_dir`."""
    recipe = {
        "deepspeed_config": "zero2_fp32",
        "data": {"dir": str(tiny_data)},
        "student": {"layers": 2, "hidden_size": 32, "num_heads": 2, "max_positions": 32},
        "teacher": {"path": str(tiny_teacher)},
        "train": {"max_steps": 4, "micro_batch_size": 4, "log_every": 1, "eval_rows": 16},
    }
    path = tmp_path_factory.mktemp("recipe") / "tiny.yaml"
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def launch() -> Callable[..., tuple[int, str]]:
    """`launch(ranks, arguments)` runs `deepspeed --num_gpus RANKS --module dwt_ds.pretrain ARGUMENTS` on the CPU.

    Each rank has one thread. Returns the exit code and all output; a run that outlasts its time is killed with every
    process under it, and fails the test with the output so far.
    """
    extra_seconds = iter([FIRST_START_SECONDS])

    def launch_ranks(
        ranks: int,
        arguments: Sequence[str],
        *,
        timeout_seconds: float = 240.0,
        environment: dict[str, str] | None = None,
        module: str = "dwt_ds.pretrain",
    ) -> tuple[int, str]:
        command = [sys.executable, str(PROGRAMS / "deepspeed"), "--log_level", "warning", "--num_gpus", str(ranks)]
        command += ["--master_port", str(get_free_port()), "--module", module, *arguments]
        timeout_seconds += next(extra_seconds, 0.0)
        return run_to_the_end(command, timeout_seconds, {**ON_CPU, **(environment or {})})

    return launch_ranks


@pytest.fixture(scope="session")
def train() -> Callable[..., tuple[int, str]]:
    """`launch` without the launcher, whose two processes cost as much as the ranks: where only what ranks do counts."""
    extra_seconds = iter([FIRST_START_SECONDS])

    def train_ranks(
        ranks: int,
        arguments: Sequence[str],
        *,
        environment: dict[str, str] | None = None,
        module: str = "dwt_ds.pretrain",
    ) -> tuple[int, str]:
        together = {**os.environ, **ON_CPU, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(get_free_port())}
        together |= {"WORLD_SIZE": str(ranks), "LOCAL_SIZE": str(ranks), **(environment or {})}
        give_up = time.monotonic() + 240.0 + next(extra_seconds, 0.0)
        with tempfile.TemporaryFile("w+", errors="replace") as output:
            processes = [
                subprocess.Popen(
                    [sys.executable, "-u", "-m", module, *arguments],
                    env={**together, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    stdin=subprocess.DEVNULL,
                )
                for rank in range(ranks)
            ]
            try:
                while None in [process.poll() for process in processes]:
                    if any(process.returncode for process in processes):
                        give_up = min(give_up, time.monotonic() + 30.0)  # the others may have something to say yet
                    if time.monotonic() > give_up:
                        break
                    time.sleep(0.05)
            finally:
                for process in processes:
                    process.kill()
                    process.wait()
            output.seek(0)
            return next((process.returncode for process in processes if process.returncode), 0), output.read()

    return train_ranks


@pytest.fixture(scope="session")
def watch(train: Callable[..., tuple[int, str]], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Watched]:
    """`watch(arguments)` is `train` of two ranks that note what they see of their run (engine/watched_pretrain.py)."""

    def watch_ranks(arguments: Sequence[str]) -> Watched:
        notes = tmp_path_factory.mktemp("notes")
        path = os.pathsep.join([str(Path(__file__).parent / "engine"), os.environ.get("PYTHONPATH", "")])
        environment = {"NOTES": str(notes), "PYTHONPATH": path}
        code, output = train(2, arguments, module="watched_pretrain", environment=environment)
        return Watched(code, output, [json.loads(file.read_text()) for file in sorted(notes.iterdir())])

    return watch_ranks


class Watched(NamedTuple):
    code: int
    output: str
    notes: list[dict[str, Any]]
    """By rank."""


@pytest.fixture
def port() -> int:
    """A TCP port for the ranks of one launch to meet at."""
    return int(get_free_port())


def run_to_the_end(
    command: Sequence[str], timeout_seconds: float, environment: dict[str, str] | None = None
) -> tuple[int, str]:
    """Exit code and output (both streams together) of a command; pytest's failure, and no process left, if it hangs."""
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
        env={**os.environ, **(environment or {})},
        text=True,
        errors="replace",
        start_new_session=True,  # so that ranks which have lost their launcher are found as well
    )
    try:
        output, _ = process.communicate(timeout=timeout_seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        pytest.fail(f"still running after {timeout_seconds:.0f} s: {' '.join(command)}\n{output}")
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    return process.returncode, output


def _invented_words() -> tuple[list[str], list[str]]:
    """200 nouns and 39 verbs."""
    syllables = [c + v for c in "bdfgklmnprstvz" for v in "aeiou"]
    nouns = [syllables[i % 70] + syllables[(i * 3 + i // 70 * 11) % 70] + "n" for i in range(200)]
    verbs = [syllables[i] + syllables[(i * 7 + 5) % 70] + "s" for i in range(39)]
    return nouns, verbs


_SYLLABLES = ["ka", "lo", "mi", "ren", "tu", "sha", "vel", "do", "pir", "an", "gos", "el"]


def made_up_documents(count: int, seed: int = 0, lines: int = 6) -> list[list[str]]:
    """Documents of paragraphs of sentences of made-up words, all lines distinct."""
    draw = random.Random(seed)
    words = ["".join(draw.choices(_SYLLABLES, k=draw.randint(1, 4))) for _ in range(400)]

    def sentence() -> str:
        chosen = draw.choices(words, k=draw.randint(4, 16))
        return " ".join([chosen[0].capitalize(), *chosen[1:]]) + draw.choice([".", ".", "!", "?"])

    return [[" ".join(sentence() for _ in range(draw.randint(2, 6))) for _ in range(lines)] for _ in range(count)]


def as_text(documents: list[list[str]]) -> str:
    return "\n\n".join("\n".join(lines) for lines in documents) + "\n"


@pytest.fixture(scope="session", name="made_up_documents")
def _made_up_documents() -> Callable[..., list[list[str]]]:
    return made_up_documents


@pytest.fixture(scope="session", name="as_text")
def _as_text() -> Callable[[list[list[str]]], str]:
    return as_text


@pytest.fixture(scope="session")
def corpus_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("corpus") / "corpus.txt"
    path.write_text(as_text(made_up_documents(60)), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def vocab_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uncased WordPiece vocabulary that spells everything and has the corpus's syllables."""
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)] + [str(digit) for digit in range(10)]
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    entries = [*special, *".,!?;:'\"()-", *letters, *["##" + c for c in letters]]
    entries += _SYLLABLES + ["##" + syllable for syllable in _SYLLABLES]
    path = tmp_path_factory.mktemp("vocab") / "vocab.txt"
    path.write_text("\n".join(dict.fromkeys(entries)) + "\n", encoding="utf-8")
    return path


Make = Callable[..., PreparedData]


@pytest.fixture(scope="session")
def make(vocab_file: Path) -> Make:
    """make(out, *files, **options) -> PreparedData, with the small vocabulary unless told otherwise."""

    def make(out: Path, *files: Path, records: RecordForm = RecordForm(), **options: Any) -> PreparedData:  # noqa: B008
        if "train_tokenizer" not in options:
            options.setdefault("tokenizer", str(vocab_file))
        options.setdefault("validation", 0.1)
        prepare(PrepareOptions(sources=[LocalFile(file, records) for file in files], out=out, **options))
        return PreparedData.open(out)

    return make


@pytest.fixture(scope="session")
def packed(tmp_path_factory: pytest.TempPathFactory, corpus_file: Path, make: Make) -> PreparedData:
    """Packed rows of 32 tokens."""
    return make(tmp_path_factory.mktemp("packed") / "data", corpus_file, seq_len=32)


@pytest.fixture(scope="session")
def by_sentence(tmp_path_factory: pytest.TempPathFactory, corpus_file: Path, make: Make) -> PreparedData:
    """A row for each sentence."""
    return make(tmp_path_factory.mktemp("by_sentence") / "data", corpus_file, seq_len=48, one_sentence_per_row=True)
