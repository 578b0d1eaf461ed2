"""LibTorch's stable ABI measured against csrc/ops: docs/stable-abi.md has the question and the answer."""
