"""Tokenizers of models. Teacher and student must give every token the same id, or the teacher's logits mean nothing;
unless the run compares only the entries that both vocabularies have.
"""

from __future__ import annotations

import copy
import inspect
import os

from transformers import PretrainedConfig, PreTrainedTokenizerBase

from dwt_ds.data.shared_vocabulary import SharedVocabulary
from dwt_ds.data.tokenizer import load_tokenizer, vocabulary_size
from dwt_ds.models.build import longest_row, masked_lm_class


def fit_to_model(
    tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig, seq_len: int | None = None
) -> PreTrainedTokenizerBase:
    """A copy for plain transformers that gives only what the model takes.

    `truncation=True` cuts at the longest row that the model can read, and there are no `token_type_ids` for a model
    that has no two types of them. The ids of tokens stay as they are.

    `seq_len` is the limit in tokens for a model without one; None: the tokenizer's own limit stays.
    """
    fitted = copy.deepcopy(tokenizer)
    longest = longest_row(config) or seq_len
    if longest is not None:
        fitted.model_max_length = longest
    if (getattr(config, "type_vocab_size", None) or 0) < 2 or not _takes_token_types(config):
        names = [name for name in fitted.model_input_names if name != "token_type_ids"]
        fitted.model_input_names = fitted.init_kwargs["model_input_names"] = names
    return fitted


def _takes_token_types(config: PretrainedConfig) -> bool:
    """Whether the masked-LM class of this configuration has an argument for them; True for code from elsewhere."""
    model_class = masked_lm_class(config)
    return model_class is None or "token_type_ids" in inspect.signature(model_class.forward).parameters


def check_same_vocabulary(
    teacher: str | os.PathLike[str], student: PreTrainedTokenizerBase, *, teacher_rows: int
) -> None:
    """Refuse a teacher whose tokenizer does not map the same tokens to the same ids.

    `teacher` is `teacher.path`, `student` the data folder's tokenizer. The teacher's decoder has `teacher_rows` rows;
    padding may make them more than the tokens.

    Raises:
        ValueError: one line with both numbers of tokens, the first id at which they differ and what they share, or too
            few rows.
        FileNotFoundError: the teacher has no tokenizer.
    """
    tokenizer = load_tokenizer(teacher)
    theirs, ours = tokenizer.get_vocab(), student.get_vocab()
    if theirs != ours:
        first = min(number for _, number in theirs.items() ^ ours.items())
        by_id = [{number: repr(token) for token, number in each.items()} for each in (theirs, ours)]
        shown = " against ".join(each.get(first, "nothing") for each in by_id)
        raise ValueError(
            f"teacher.path: its vocabulary of {len(theirs)} tokens is not the {len(ours)} of the data folder; first "
            f"at id {first}: {shown}; prepare the data with the teacher's tokenizer, or train the teacher on this data"
            f"{_way_out(student, tokenizer)}"
        )
    check_decoder_rows(tokenizer, teacher_rows)


def check_decoder_rows(teacher: PreTrainedTokenizerBase, teacher_rows: int) -> None:
    """Refuse, with a ValueError of one line, a teacher whose decoder has fewer rows than its tokenizer has tokens."""
    size = vocabulary_size(teacher)
    if teacher_rows < size:
        raise ValueError(
            f"teacher.path: its decoder has {teacher_rows} rows for a vocabulary of {size}; give the model that "
            "belongs to its tokenizer"
        )


def _way_out(student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase) -> str:
    try:
        share = SharedVocabulary.of(student, teacher).share_of_student
    except ValueError:  # such a teacher cannot teach by shared entries either
        return ""
    return f", or set teacher.vocabulary=shared: {share:.0%} of the data folder's entries are the teacher's too"
