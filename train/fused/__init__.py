"""Kernels of the training step, in Triton. What may run where is said by `triton_runtime`."""
