"""Measurements, as ratios taken in one run; run from a checkout. Nothing in engine, models or data imports this."""
