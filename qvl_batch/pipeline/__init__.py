"""The job on Ray Data: the plan, the stages and their actors, the cluster, and the run as a whole."""

import os

# Read when ray is imported, which this room alone does.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
