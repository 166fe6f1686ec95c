"""Graphs on devices: the only room that talks to ONNX Runtime and CUDA."""
