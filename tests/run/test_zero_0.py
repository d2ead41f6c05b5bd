"""A run in fp32 without ZeRO, whose optimizer DeepSpeed does not wrap, on rows of one sentence, none held out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from harness.ranks import Train
from harness.runs import completed, rows_of

from dwt_ds.data.prepared import PreparedData


def test_its_folder_tells_what_was_run(train: Train, tiny_recipe: Path, sentence_data: Path, tmp_path: Path) -> None:
    json_file = tmp_path / "mine.json"
    json_file.write_text(json.dumps({"zero_optimization": {"stage": 0}, "gradient_clipping": 0.5}))
    arguments = [str(tiny_recipe), f"output_dir={tmp_path / 'run'}", f"data.dir={sentence_data}", "train.max_steps=80"]
    text = completed(train(1, [*arguments, "--deepspeed_config", str(json_file)]))
    assert "ZeRO-0, fp32" in text
    assert "no held-out rows to measure it by" in text
    rows = rows_of(tmp_path / "run")
    norms = [row["grad_norm"] for row in rows if "loss" in row]
    assert len(norms) == 80
    assert max(norms) > 0.5, "before clipping"
    assert not any("eval_hard_loss" in row for row in rows)
    lengths = PreparedData.open(sentence_data).train.lengths
    assert rows[-1]["tokens"] == lengths.sum() < 80 * 4 * 32, "an epoch, padding not counted"
    assert "held-out" not in (tmp_path / "run" / "export" / "README.md").read_text()
    # The folder's own recipe makes the same run again.
    saved = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert saved["deepspeed_config"] == str(json_file)
    saved["output_dir"] = str(tmp_path / "again")
    (tmp_path / "again.yaml").write_text(yaml.safe_dump(saved))
    completed(train(1, [str(tmp_path / "again.yaml")]))
    again = rows_of(tmp_path / "again")
    assert [row["loss"] for row in again if "loss" in row] == [row["loss"] for row in rows if "loss" in row]
    assert [row["grad_norm"] for row in again if "loss" in row] == pytest.approx(norms)
