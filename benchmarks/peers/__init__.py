"""The same work by other trainers."""
