"""Text generation: greedy search, sampling and beam search, with a cache of keys and values."""
