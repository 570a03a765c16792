"""Compute the cells of a sweep, on this machine or on a Ray cluster, and write their records.

In: the cells of a sweep. Out: their records, each written when its cell is finished.
"""
