"""NF4 by hand in numpy: what a program without any library would write to decode it."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.peers.base import Codec, Peer
from squish_nf4 import _C


class Numpy(Peer):
    name = "numpy"
    note = "NF4 decoded by a table of all bytes; it has no quantizer"

    def codec(self, dtype: torch.dtype, group_size: int) -> Codec | None:
        if dtype != torch.float32:
            return None
        levels = np.array(_C.codebook(), dtype=np.float32)
        byte = np.arange(256)
        pairs = np.stack((levels[byte & 15], levels[byte >> 4]), axis=1)  # of both columns of a byte at once

        def dequantize(stored: Any) -> Tensor:
            packed, scales = stored
            n, columns = packed.shape[0], packed.shape[1] * 2
            decoded = pairs[packed.numpy()].reshape(n, columns // group_size, group_size)
            decoded *= scales.numpy()[:, :, np.newaxis]
            return torch.from_numpy(decoded.reshape(n, columns))

        return Codec(lambda w: torch.ops.squish.quantize_nf4(w, group_size), dequantize)
