"""Times the loss against bare matrix products, dense PyTorch and other libraries, in one run.

`workloads` defines the problems, `variants` the implementations and their references, `measure` the timed rounds,
`report` the table, the JSON and the plot.
"""
