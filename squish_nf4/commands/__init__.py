"""The command line: what prints, draws and measures. It may know everything, and nothing knows it."""
