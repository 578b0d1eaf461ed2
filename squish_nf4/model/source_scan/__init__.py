"""Which modules of a model read the weights of others: what their source says."""
