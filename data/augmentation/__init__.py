"""Augmentation: functions of the seed, the epoch and the id of an example."""
