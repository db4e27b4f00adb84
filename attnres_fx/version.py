"""The version, in a file that imports nothing else."""

from __future__ import annotations

VERSION = "0.1.0"
