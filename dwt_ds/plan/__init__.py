"""What a run will need, before it is started: memory, time, traffic, disk. Nothing here talks to other processes."""
