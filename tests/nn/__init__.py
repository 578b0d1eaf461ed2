"""squish_nf4/nn, model.py and choose.py: layers on packed bytes, their state, and whole models."""
