"""The files of a checkpoint: where they are found, how their tensors are read, checked and written."""
