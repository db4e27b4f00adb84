"""Check that a converted model is what it should be: for live models and for programs."""
