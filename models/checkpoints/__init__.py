"""The files of a checkpoint: found on the machine or the hub, read, checked and written."""
