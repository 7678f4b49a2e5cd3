"""Runs and results as one page."""
