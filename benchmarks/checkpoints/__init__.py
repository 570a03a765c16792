"""Which pretrained checkpoints, from where.

In: names, patterns, folders, repositories. Out: `Checkpoint`s, which can be asked before any weight is downloaded.
"""
