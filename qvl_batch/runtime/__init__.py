"""Graphs on devices: the only folder that uses ONNX Runtime and CUDA."""
