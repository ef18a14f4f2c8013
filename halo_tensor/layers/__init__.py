"""The kinds of layers that are converted."""
