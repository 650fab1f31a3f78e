"""engine.train on a simulated GPU: tests/gpu_rehearsal/README.md."""
