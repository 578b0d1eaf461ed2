"""Fuzzing of the readers: targets that take any bytes, seeds worth keeping, and the fuzzer that finds more."""
