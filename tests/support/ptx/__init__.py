"""Runs CUDA kernels without a GPU: nvcc makes PTX of them, and numpy executes it, thousands of threads at once.

    parser.py      the text of a module into instructions
    operations.py  what an instruction means; one that our kernels do not use is an error by its name
    machine.py     threads that diverge and meet again, warps that shuffle and multiply, blocks that wait at barriers
    memory.py      global, shared and local memory, which watch every access
    host.py        the launchers of csrc/cuda as they are, on a CUDA runtime that hands their launches to the machine

A KernelError says what a kernel did that no kernel may do: an access out of bounds or misaligned; a load of what nobody
has written; a store to an input; a race in shared memory, or two values for one place in global memory; a warp or a
block that waits for threads that never come.

What it cannot know: time, registers, what ptxas makes of the PTX, and in what order a tensor core adds (here: in
float64, rounded once).
"""
