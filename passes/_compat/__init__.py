"""Where the compiler touches torch's private interfaces; nothing else does."""
