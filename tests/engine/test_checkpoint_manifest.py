"""What a manifest says of a run: its keys are read by later versions, so they must not change."""

from __future__ import annotations

import json

from dwt_ds.engine.checkpoint.manifest import RunFacts

MANIFEST = {
    "data": "d",
    "tokenizer": "t",
    "vocab_size": 298,
    "seq_len": 32,
    "student": {"layers": 2},
    "teacher": None,
    "versions": {"torch": "2.13.0"},
    "settings": {"seed": 1, "deepspeed": {"train_batch_size": 8}},
    "settings_sha256": "5",
}
QUANTIZED = {**MANIFEST, "quantization": {"weight_bits": 8}}


def test_the_facts_of_a_run_come_back_from_a_manifest_and_keep_its_keys() -> None:
    for written in (MANIFEST, QUANTIZED):
        stored = json.loads(json.dumps({"state": {"step": 4}, "world_size": 2, **written, "files": {}}))
        facts = RunFacts.from_manifest(stored)
        assert facts.to_dict() == written
        assert list(facts.to_dict()) == list(written)
    assert facts.identity == {"data": "d", "tokenizer": "t", "student": {"layers": 2}}
