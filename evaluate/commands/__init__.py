"""The commands of `python -m evaluate`: a module each, with its settings and `run`."""
