"""What a sweep leaves on the disk: one JSON file for each finished cell, and tables beside them.

In: what was measured, as plain values. Out: files that a crash cannot cut, and the records read back.
"""
