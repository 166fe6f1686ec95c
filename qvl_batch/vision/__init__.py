"""Pixels to features: the vision graph, each image once, and features kept on disk."""
