"""The bundle: one directory with everything that a worker needs, written by `python -m export`."""
