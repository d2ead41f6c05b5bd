"""The score on SST-2 that a fine-tuned model should exceed: that of a logistic regression on word counts.

    python benchmarks/sst2_bag_of_words.py [--glue-dir DIR]

Trains on the training set with scikit-learn's default regularisation, uses the dev set for nothing but the score, and
prints the accuracy on it. Without --glue-dir the data come from `nyu-mll/glue` on the hub. Needs the extra
`study`.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline

from dwt_ds.glue.reading import FIRST, LABEL, TaskData, read_task
from dwt_ds.glue.tasks import find_task


def main() -> int:
    """Prints one line; 2 for missing or wrong data."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--glue-dir", type=Path, metavar="DIR", help="as for dwt-ds glue")
    glue_dir = parser.parse_args().glue_dir
    task = find_task("SST-2", "task")
    try:
        data = read_task(task, glue_dir)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(_report(data))
    return 0


def _report(data: TaskData) -> str:
    # SST-2 comes tokenized, with spaces between the words.
    model = make_pipeline(CountVectorizer(token_pattern=r"\S+"), LogisticRegression(max_iter=1000))
    model.fit(data.train.rows[FIRST], data.train.rows[LABEL])
    (validation,) = data.validation
    accuracy = 100.0 * model.score(validation.rows[FIRST], validation.rows[LABEL])
    name = "GLUE dev" if validation.is_official else "not GLUE dev"
    return (
        f"SST-2, bag of words, logistic regression: accuracy {accuracy:.2f} on {len(validation.rows):,} rows of "
        f"{validation.file} ({name}), trained on {len(data.train.rows):,}"
    )


if __name__ == "__main__":
    sys.exit(main())
