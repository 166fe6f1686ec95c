"""Kinds of input files, each behind the interface of `container.Container`."""
