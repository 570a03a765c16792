"""Write and read what a sweep leaves on disk: one JSON record for each finished cell, and tables beside them.

In: measurements, as plain values. Out: files that a crash cannot truncate, and the records read back.
"""
