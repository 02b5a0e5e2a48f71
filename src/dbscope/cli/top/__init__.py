"""`dbscope top`: who holds which connection, now, of all processes of this user.

Collect, snapshot, render:

- `arguments.py`: the command line
- `rows.py`: what processes and PostgreSQL answer, joined, as frozen rows; sorting and filtering
- `plain.py`: rows to lines and to JSON, for pipes and scripts
- `keys.py`: what a key does to what is shown: a pure function; and where keys come from
- `screen.py`: rows to something that rich can print
- `live.py`: the view that goes on
- `command.py`: the whole command
"""
