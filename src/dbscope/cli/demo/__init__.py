"""`dbscope demo`: a small bank on real HTTP servers, handlers that misbehave, and an audit that proves the books right.

| file | what it holds |
|---|---|
| `arguments` | the command line |
| `command` | the whole demo, from the first request to the exit status |
| `books` | the tables, and what a payment does to them |
| `endpoints`, `misbehaviour`, `work` | the code of the bank's programmers: good handlers, bad ones, jobs and workers |
| `web`, `log`, `service` | how servers reach the handlers, and what they have answered |
| `doors`, `without`, `unprotected` | dbscope; without one of its protections; hand-written sessions instead of it |
| `load` | the clients |
| `watch`, `facts`, `screen` | collect, snapshot, render |
| `audit` | what the clients were told, what the servers say and what the database holds, compared |
"""
