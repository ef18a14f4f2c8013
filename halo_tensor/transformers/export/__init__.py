"""Checkpoints for servers: a converted model as compressed-tensors W8A8, as vLLM reads it."""
