"""Hand-written mixes: proposed by structure, confirmed by numbers, replaced by the operator."""
