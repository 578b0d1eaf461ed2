"""The checkpoint room: safetensors in, the squish directory out and back. Knows the operators and the layouts, and no
terminal. convert.py and reader.py are the two doors."""
