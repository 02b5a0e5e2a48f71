"""Scopes for the work that frameworks and servers hand out. Each module is imported by its path:

- `dbscope.integrations.asgi.ScopeMiddleware`: a scope for each request of any ASGI application
- `dbscope.integrations.wsgi.ScopeMiddleware`: a scope for each request of any WSGI application
- `dbscope.integrations.flask.Scopes`: a scope for each request, command and application context of a Flask application
- `dbscope.integrations.click.Scopes`, `dbscope.integrations.typer.Scopes`: a scope for each command of a program
- `dbscope.integrations.ipython`: a scope for each cell of IPython and Jupyter, by `%load_ext`
- `dbscope.integrations.celery.CeleryScopes`: a scope for each task of a Celery application, and messages that wait for
  the commit
- `dbscope.integrations.prometheus.Metrics`, `dbscope.integrations.structlog.Logs`: what happens, as metrics and as logs

The middlewares import neither a framework nor a server.
"""
