"""What is measured of a checkpoint on a data set.

In: a `Cell` (checkpoint, data, task, size), its images, and `Options`. Out: the cell's record: scores of every setting
from one pass, and what they say.
"""
