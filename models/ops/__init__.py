"""The operations that the architectures share: attention, dropout, losses, layers."""
