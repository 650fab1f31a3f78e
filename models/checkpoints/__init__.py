"""Find, read, check and write the files of a checkpoint."""
