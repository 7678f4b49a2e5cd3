"""The parts of a pipeline, made fast."""
