"""A Ray cluster with an encoder pool and a trainer pool."""
