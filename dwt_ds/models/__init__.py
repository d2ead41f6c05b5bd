"""Models: build or load them, split off the MLM head, grow a student from its teacher, train it quantized."""
