"""Building blocks of the architectures: packing, attention, dropout, losses, compilation."""
