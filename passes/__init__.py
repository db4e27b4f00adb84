"""The compiler: analyses and transformations of torch.fx graphs, one pass per file."""
