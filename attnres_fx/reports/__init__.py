"""Reports for people: streams, memory, kernels, graphs, as tables, drawings and plain data."""
