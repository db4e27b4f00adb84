"""Residual streams: found by data flow, with what stands against a rewrite. Analysis alone."""
