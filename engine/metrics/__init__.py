"""Metrics from sums: one file for each task, counts.py for what they share.

Each file has a `..._statistics` function, which turns a batch into numbers that add over batches and ranks, and a
`..._metrics` function, which computes the metrics from the sums. A metric is therefore the same for every evaluation
batch size and every number of ranks. A metric that does not come from sums, such as a rank correlation or the best
threshold of all answers, keeps a row for each example in an (N, K) matrix that is zero elsewhere; such matrices add.
"""
