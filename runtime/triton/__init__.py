"""Triton kernels of the mix. Importing this package does not import triton; :mod:`.launch` does.

Not run on a GPU so far: their values come from Triton's interpreter, their resources from binaries compiled ahead of time.
"""
