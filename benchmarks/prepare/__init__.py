"""Data sets and small checkpoints for recipes and benchmarks, made from public packages."""
