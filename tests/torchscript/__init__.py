"""squish_nf4/torchscript: scripting and tracing, and files that are tried in a process of their own."""
