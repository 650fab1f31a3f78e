"""Metrics from sums: each micro-batch adds to one vector, vectors add over ranks, and only then a metric is computed.

So a metric is the same for every evaluation batch size and every number of ranks. What does not add, such as the best
threshold of all answers, keeps a row for each example in an (N, K) matrix of zeros, and matrices add.
"""
