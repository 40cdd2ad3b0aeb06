"""Programs for accelerators that are not there: compiled, read and counted.

`compiling` builds a program with the real compiler of an absent TPU, `bundles` counts the cycles
of its machine code, and `chips` has the figures of the chips. Nothing here is imported by the
operations; `python -m kernels.estimate` is the command.
"""
