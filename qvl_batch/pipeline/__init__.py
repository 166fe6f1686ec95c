"""The job on Ray Data: the plan, the stages and their actors, the cluster, and the run as a whole."""
