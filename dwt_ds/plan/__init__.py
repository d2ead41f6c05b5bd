"""What a run will need, before it starts: memory, time, traffic, disk. Nothing here talks to other processes."""
