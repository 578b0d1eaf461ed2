"""Other people's libraries, imported only where they are asked for; so far transformers, for a model by its directory.

Nothing here prints; the commands do.
"""
