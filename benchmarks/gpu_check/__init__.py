"""Everything that only a GPU can show, in one command of a few minutes: `python -m benchmarks.gpu_check`."""
