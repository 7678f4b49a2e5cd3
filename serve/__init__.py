"""HTTP inference: a checkpoint or any diffusers pipeline behind an address."""
