"""Where and in which order cells are computed.

In: the cells of a sweep. Out: their records, written as they come: from processes of this machine, or a Ray cluster.
"""
