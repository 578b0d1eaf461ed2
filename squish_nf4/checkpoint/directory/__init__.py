"""The squish directory, both ways: what its files are called, .npy files, tables, and the reader, which trusts nothing."""
