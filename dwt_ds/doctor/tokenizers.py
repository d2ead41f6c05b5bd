"""Whether the tokenizers of a recipe's data folder and of its teacher go together."""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase

from dwt_ds.config.recipe import load_recipe
from dwt_ds.data.prepared import PreparedData
from dwt_ds.data.tokenizer import load_tokenizer, tokenizer_sha256, vocabulary_size
from dwt_ds.doctor.judge import CheckResult
from dwt_ds.models.tokenizers import check_same_vocabulary
from dwt_ds.run.other_vocabulary import OtherVocabulary

_FIX = "docs/another_vocabulary.md"


def check_tokenizers(recipe: str) -> CheckResult:
    """Name both tokenizers of a recipe, by path or packaged name, and what they share."""
    try:
        config = load_recipe(recipe, []).config
        ours = PreparedData.open(config.data.dir).tokenizer()
        found = f"data: {_words(ours)}"
        if config.teacher.path is not None:
            theirs = load_tokenizer(config.teacher.path)
            found += f"; teacher: {_words(theirs)}"
            other = OtherVocabulary.load(config.teacher, ours)
            if other is None:
                check_same_vocabulary(config.teacher.path, ours, teacher_rows=vocabulary_size(theirs))
                found += "; the same vocabulary"
            else:
                found += f"; {len(other.shared.student_ids):,} shared entries"
    except (ValueError, OSError) as error:
        return CheckResult("tokenizers", "", str(error), _FIX)
    return CheckResult("tokenizers", "", found)


def _words(tokenizer: PreTrainedTokenizerBase) -> str:
    kind = type(tokenizer.backend_tokenizer.model).__name__ if tokenizer.is_fast else "not a fast one"
    return f"{kind}, {vocabulary_size(tokenizer):,} entries, {tokenizer_sha256(tokenizer)[:12]}"
