"""``python -m attnres_fx.cli``."""

from __future__ import annotations

from attnres_fx.cli.commands import main

main()
