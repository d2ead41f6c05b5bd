"""Names in the folder of a run: exports and studies read there what a run writes."""

from __future__ import annotations

RECIPE = "config.yaml"
"""Settings as resolved."""
DS_JSON = "ds_config.json"
IDENTITY = "run.json"
"""Which run it is, and what it wrote."""
COMPLETE = "complete.json"
METRICS = "metrics.jsonl"
SKIPPED = "skipped.jsonl"
TOKENIZER = "tokenizer"
CHECKPOINTS = "checkpoints"
EXPORT = "export"
STUCK = "stuck"
"""Each rank's report when the run makes no progress."""
