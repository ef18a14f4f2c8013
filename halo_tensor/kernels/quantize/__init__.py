"""Rotate and quantise matrices."""
