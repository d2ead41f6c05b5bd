"""GLUE: fine-tune a checkpoint on its tasks and score it, several seeds each.

`tasks` defines the tasks, `reading` reads their rows, `finetune` trains and scores one (task, seed) pair, `run` does
all pairs on all GPUs, `scores` summarizes them.
"""
