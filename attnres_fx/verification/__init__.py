"""Is a converted model what it should be: for live models and for programs."""
