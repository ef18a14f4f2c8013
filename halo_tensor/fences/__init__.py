"""Private names of PyTorch, torchao and Triton, and the switches of the fast paths that use them."""
