"""What is written against private names of PyTorch and Triton: fast paths with their switches, and the names themselves."""
