"""Passes over mixes: how they are read, what they are fused with, which kernels they run."""
