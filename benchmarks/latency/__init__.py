"""How long an image takes: the plain diffusers pipeline beside ours."""
