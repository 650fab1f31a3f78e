"""Augmentation of training examples: pure functions of (seed, epoch, id of the example)."""
