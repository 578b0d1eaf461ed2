"""The checkpoint room: safetensors in, the squish directory out and back. Knows the operators and the layouts, and no
terminal. convert.py and npy_dir.py are the two doors."""
