"""The command line; :func:`main` is the console command ``attnres``."""

from __future__ import annotations

from attnres_fx.cli.commands import main

__all__ = ["main"]
