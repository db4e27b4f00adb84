"""Operators, their kernels, and the modules that hold the parameters. Nothing here knows torch.fx."""
