"""Streams become Attention Residuals: blocks, plans, the match of a graph with its plans, the rewrite."""
