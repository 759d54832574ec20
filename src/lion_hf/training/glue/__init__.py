"""GLUE: the tasks with the paper's numbers, their data and metrics, and the runs that a score is made of.

One module may import those before it: `tasks`, `builtin`, `sources`, `data`, `metrics`, `summary`, `suite`.
`offline` is a script that the package `evaluate` loads.
"""
