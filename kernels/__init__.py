"""Triton device code, shipped as ``prefix_fast.kernels``; ``prefix_fast.backends`` launches it."""
