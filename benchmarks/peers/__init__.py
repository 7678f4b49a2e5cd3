"""Other people's loaders, each reading its own format with its own code, in `.venv-peers`.

This package runs in an environment without ours: `python -m peers` with `benchmarks/` as the
working folder. That is why its imports of itself are relative and nothing else of ours is imported.
"""
