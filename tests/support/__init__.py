"""What tests share, but for their fixtures, which stand in conftest.py. No test imports from another test file."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]  # of the repository
