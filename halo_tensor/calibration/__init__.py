"""What is measured on batches before training: balances, and configs for each layer."""
