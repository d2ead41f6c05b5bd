"""Student weights that start from a smaller teacher's."""
