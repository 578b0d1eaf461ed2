"""How much is read at a time, and by how many threads, so that a conversion stays under its memory cap."""

from __future__ import annotations

from dataclasses import dataclass

from squish_nf4.checkpoint.values import BLOCK

MIB = 2**20
DEFAULT_MAX_RAM = 1024 * MIB
LEAST_MAX_RAM = 64 * MIB
LARGEST_STRETCH = 2**21  # values; more would gain nothing

# Bytes held at once for a value of a stretch: as it was read, a widened copy, and as it is stored. float64 kept as
# float32 takes 8 + 0 + 4, bfloat16 kept as float16 2 + 4 + 2, float64 in NF4 with a scale for each pair 8 + 0 + 2.5. (A
# scale for each value takes half a byte more than this; only a quarter of the cap is shared out.)
OF_A_STRETCH = 12
# Bytes for a value of the block that a thread looks at: a widened copy, and what it becomes.
OF_A_BLOCK = 8


@dataclass(frozen=True)
class Budget:
    """stretch: values read at a time. workers: the threads that read and encode them."""

    stretch: int
    workers: int

    @property
    def ahead(self) -> int:
        """How many stretches may be ahead of the writer: one in each worker, and one done, so that it need not wait."""
        return self.workers + 1


def share_out(max_ram: int, longest_row: int, threads: int) -> Budget:
    """The budget for max_ram bytes of anonymous memory beyond the interpreter and the libraries.

    A quarter of max_ram is shared out. The heaps of the threads keep what was freed, and so hold the stretches twice
    and more; buffers of files and tables are not counted here either.

    Args:
        longest_row: values in the longest row that is quantized; a stretch holds whole rows.
        threads: the most that may work.

    Raises:
        ValueError: max_ram is too small for anything, or for that row.
    """
    if max_ram < LEAST_MAX_RAM:
        raise ValueError(f"max_ram must be at least {LEAST_MAX_RAM // MIB} MiB, got {max_ram / MIB:g} MiB")
    block = max(BLOCK, longest_row)
    for workers in range(threads, 0, -1):
        # The tensor that is written may turn out to be kept: stretches of it are read beside those read ahead.
        stretches = 2 * (Budget(0, workers).ahead + 1)
        stretch = (max_ram // 4 - workers * OF_A_BLOCK * block) // (stretches * OF_A_STRETCH)
        if stretch >= block:
            return Budget(max(block, min(stretch, LARGEST_STRETCH)), workers)
    needed = (stretches * OF_A_STRETCH + OF_A_BLOCK) * block * 4
    raise ValueError(
        f"a row of {longest_row} columns is quantized as a whole, which takes max_ram of {-(-needed // MIB)} MiB, "
        f"got {max_ram / MIB:g} MiB; passthrough keeps its tensor instead"
    )
