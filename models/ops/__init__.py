"""Parts of the architectures below the level of a model: packing, attention, dropout, losses, compilation."""
