"""What a session's life costs: dbscope beside SQLAlchemy's own means, row by row, against the targets.

`python -m benchmarks` (`make bench`) prints the table; `--help` lists the options.
"""
