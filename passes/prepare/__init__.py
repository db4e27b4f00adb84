"""Passes that bring a traced graph into the form in which streams are found."""
