"""From a laptop to a cluster: what a container, a scheduler or a cloud service runs."""
