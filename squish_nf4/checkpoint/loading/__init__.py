"""A squish directory into a model."""
