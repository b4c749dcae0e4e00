"""The self-test of an installation: what is there against its lock, and whether it works."""
