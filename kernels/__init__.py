"""Triton device code, shipped as ``prefix_fast.kernels``; host code launches it from ``prefix_fast.backends``."""
