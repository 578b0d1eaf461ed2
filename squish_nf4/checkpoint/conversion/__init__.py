"""A checkpoint becomes a squish directory: planned, encoded, streamed under a memory cap, committed, resumable."""
