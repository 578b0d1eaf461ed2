"""The command line: arguments, exit codes, and all that is printed and drawn. It may know everything.

What a program could want stands in the rooms below. Who imports it: __main__, and the benchmarks, which take the demo's
model and the style of the pictures.
"""
