"""GLUE: the tasks with the paper's recipe, their data and metrics, and the runs behind a GLUE score.

Each module imports only modules before it: `tasks`, `builtin`, `sources`, `data`, `metrics`, `summary`, `suite`.
`offline` is a metric script for the package `evaluate`.
"""
