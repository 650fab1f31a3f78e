"""The same workloads in other trainers, and transformers' generate beside ours."""
