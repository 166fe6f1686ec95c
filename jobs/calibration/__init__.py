"""Calibration of confidence on answers whose truth is known."""
