"""Find pretrained checkpoints.

In: names, patterns, folders, repositories. Out: `Checkpoint`s, whose configuration is known before weights are
downloaded.
"""
