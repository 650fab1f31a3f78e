"""The kinds of files that data is read from."""
