"""The bundle: one directory with everything a worker needs, as `python -m export` writes it."""
