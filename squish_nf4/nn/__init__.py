"""Modules on packed bytes: a linear layer, a packer, and what any such module knows of its bytes (packed.py).

Which layers of a model become such modules is decided in squish_nf4/model.
"""
