"""The commands of `python -m serve`: a module each, with its settings and `run`."""
