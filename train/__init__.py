"""Stage 2: train a U-Net from latent shards alone."""
