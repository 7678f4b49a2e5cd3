"""The two data formats: image shards in, latent datasets out. numpy and safetensors, no torch."""
