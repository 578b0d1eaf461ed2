"""csrc/ops: the operators as torch sees them: registration, errors, gradients, vmap, decompositions, fake CUDA."""
