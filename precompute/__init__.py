"""Stage 1: encode image shards once into latent shards."""
