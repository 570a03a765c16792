"""What records say together.

In: the records of a folder. Out: verdicts over checkpoints, tables, pages, published figures to compare with, and what
goes to the Hub.
"""
