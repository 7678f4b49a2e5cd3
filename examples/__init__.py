"""The embedded default: captioned scenes drawn on demand, and a tiny diffusers model folder."""
