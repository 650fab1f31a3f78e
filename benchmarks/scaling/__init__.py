"""Predict step time, memory and communication of DDP, FSDP and HSDP on many devices: python -m benchmarks.scaling."""
