"""engine.train on a GPU that is not there: tests/gpu_rehearsal/README.md."""
