"""Data sets and batches: one file per data set or form of data."""
