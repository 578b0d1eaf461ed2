"""Is this machine right: what was built and found, and a self-test of the operators. It finds, and prints nothing."""
