"""GLUE: fine-tune a checkpoint on its tasks and score it, several seeds each.

`tasks` says what the tasks are, `local_files` and `hub` read them, `finetune` trains and scores one (task, seed) pair,
`run` does all pairs, over all GPUs, `results` adds them up.
"""
