"""What `bench.py` is made of: who is measured, against which limits, and in which situations.

Each contender answers in a process of its own, so that its memory can be told from the others' and
its packages may differ from ours.
"""
