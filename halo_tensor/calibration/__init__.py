"""Measurements on batches before training: balances, and a config for each layer."""
