"""Metrics from sums: one file for each task, counts.py for what they share.

Each file has two functions:

- `..._statistics` turns a batch into numbers that add over batches and ranks;
- `..._metrics` computes the metrics from the sums.

A metric is therefore the same for every evaluation batch size and every number of ranks. Some metrics need all examples
at once, such as a rank correlation or the best threshold of all answers. Their statistics are an (N, K) matrix with a
row for each example of the data set, zero outside the batch; such matrices add too.
"""
