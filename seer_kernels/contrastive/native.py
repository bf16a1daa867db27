"""Launches the compiled kernels."""
