"""Kernels in Triton and Gluon, and how they are launched."""
