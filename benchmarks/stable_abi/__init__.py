"""LibTorch's stable ABI measured against csrc/ops: docs/native/stable-abi.md has the question and the answer."""
