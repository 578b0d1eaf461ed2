"""Whole models: which layers are quantized (choose.py), what a model's own code reads of them (source_scan), and the
replacing itself (quantize.py), with its report."""
