"""The forecast of a job from a random sample of its rows: what it will need, and how sure that is."""
