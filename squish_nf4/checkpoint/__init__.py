"""Checkpoints: safetensors in, the squish directory out and back. Knows the operators and the layouts, and no terminal.

source/      what somebody else wrote: safetensors shards, and the small files beside them
directory/   our own format, both ways: names, .npy files, tables, and the reader, which trusts nothing
conversion/  theirs to ours, under a memory cap, resumable at any moment
loading/     a directory into a model
audit/       a directory looked at: by itself, against its source, against another
values.py, files.py, resources.py, messages.py: the ground that these rooms stand on

source and directory do not know each other, nor do conversion, loading and audit; tests/package/test_layering.py holds
them to it. What a program may call is importable from squish_nf4 itself: convert, dry_run, quantize_tensor,
load_npy_dir, iter_npy_dir, load_into, verify, diff, inspect, their reports and errors.

Words: a *stretch* is what is read at once of a tensor, a *block* what a thread looks at in one step, a *part file* one
that has no final name yet.
"""
