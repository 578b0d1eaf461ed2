"""The squish directory, both ways: what its files are called, .npy files, tables, and a reader that trusts nothing."""
