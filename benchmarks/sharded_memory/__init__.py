"""The host memory of each rank while a large model is loaded and trained, sharded or not. See __main__.py."""
