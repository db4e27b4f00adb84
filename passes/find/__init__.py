"""Residual streams: found by data flow, with what prevents a rewrite. Analysis alone."""
