"""Data sets and small checkpoints that recipes and benchmarks use, made from packages."""
