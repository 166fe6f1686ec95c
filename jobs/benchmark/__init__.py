"""What `bench.py` is made of: who is measured, against which limits, and in which situations."""
