"""The rows that mixes read: how long each lives, where it is placed, how many fit into a budget."""
