"""Modules on packed bytes: a linear layer, an embedding, a packer, what any such module knows of its bytes.

Which layers of a model become such modules is decided in squish_nf4/model.
"""
