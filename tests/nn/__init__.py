"""squish_nf4/nn and squish_nf4/model: layers on packed bytes, their state, and whole models."""
