"""The same losses whatever the ranks, the strategy and the accumulation; beside HF Trainer. See __main__.py."""
