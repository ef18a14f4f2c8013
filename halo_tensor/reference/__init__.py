"""The definition of every op, in plain PyTorch. Kernels are tested against it, and a CPU runs it."""
