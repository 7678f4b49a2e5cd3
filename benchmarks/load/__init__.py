"""Load on a server: its capacity, and what becomes of more than that."""
