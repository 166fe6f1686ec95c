"""Modules of `bench.py`: the contenders, limits of the machine, and situations to measure our engine in.

Each contender answers in its own process, so that its memory is measured separately and its packages
can differ from ours.
"""
