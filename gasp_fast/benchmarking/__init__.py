"""Measuring the loss against its floor and its peers, in one run.

`workloads` are the problems, `variants` the ways to solve them, `measure` the clockwork, `report` the table, the JSON
and the plot. Nothing here is imported by the loss.
"""
