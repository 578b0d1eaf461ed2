"""csrc/cpu and csrc/nf4: the values of every operator on every CPU path, the codebook, the compiled code."""
