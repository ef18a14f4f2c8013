"""Kernels in Triton and Gluon, and their launches."""
