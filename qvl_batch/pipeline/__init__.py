"""The job on Ray Data: the plan, the stages and their actors, the cluster, and the run as a whole."""

import os

# Read when ray is imported, which only this package does.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
