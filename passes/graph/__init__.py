"""What every pass needs to know about graphs: values, names of operators, memory, edits, capture."""
