"""csrc/cuda on a GPU: bytes equal to the CPU's, products against float64, streams, graphs. make gpu-check runs them."""
