"""Exports a Qwen2.5-VL checkpoint to a bundle: see `export.package`."""
