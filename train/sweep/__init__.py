"""Hyper-parameter search: many short runs of the trainer, their losses against their cost."""
