"""The version, where nothing else has to be imported for it."""

from __future__ import annotations

VERSION = "0.1.0"
