"""After training: images from a run, and what they are worth."""
