"""Summarise the records of a folder.

In: records. Out: verdicts over checkpoints, tables, figures, the page, comparisons with published results, and
checkpoints to push to the Hub.
"""
