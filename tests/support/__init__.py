"""What several tests share: tiny models and data sets, runs, and comparisons."""
