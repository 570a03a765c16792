"""Measure a checkpoint on a data set.

In: a `Cell` (checkpoint, data, task, size), its images, and `Options`. Out: the cell's record, with the metrics of
every setting from one forward pass per image.
"""
