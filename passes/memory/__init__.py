"""The rows that mixes read: how long each lives, where it lies, how many fit into a budget."""
