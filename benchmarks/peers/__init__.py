"""The libraries we compare with, a small plug-in each; those that are not installed are left out with a word."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import cache

from benchmarks.peers.base import Codec, Linear, Peer
from benchmarks.peers.bitsandbytes import BitsAndBytes
from benchmarks.peers.ggml import Ggml
from benchmarks.peers.numpy import Numpy
from benchmarks.peers.torch import Dense, Int4Pack
from benchmarks.peers.torchao import TorchAO

__all__ = ["ALL", "Codec", "Linear", "Peer", "left_out_if_it_fails", "peers"]

ALL: tuple[Peer, ...] = (Dense(), BitsAndBytes(), Int4Pack(), Ggml(), TorchAO(), Numpy())


@cache
def peers() -> tuple[Peer, ...]:
    """Those that are installed; the others are named once."""
    for peer in ALL:
        if peer.missing():
            print(f"{peer.name} is not installed: left out ({peer.install})")
    return tuple(peer for peer in ALL if not peer.missing())


@contextlib.contextmanager
def left_out_if_it_fails(peer: Peer, what: str) -> Iterator[None]:
    """A peer that cannot do something does not end the run: what it says is printed, and it is left out."""
    try:
        yield
    except Exception as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        print(f"{peer.name} is left out of {what}: {first}")
