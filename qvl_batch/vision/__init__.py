"""Pixels to features: the vision graph, one run for each image, and a cache of features on disk."""
