"""Speed and memory measurements. Run them from a checkout; engine, models and data do not import this package."""
