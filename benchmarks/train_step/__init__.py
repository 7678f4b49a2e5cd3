"""The training step of stage 2, beside the plain diffusers loop."""
