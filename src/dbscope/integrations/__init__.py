"""Scopes for the work that frameworks and servers hand out. Each module is imported by its path:

- `dbscope.integrations.asgi.ScopeMiddleware`: a scope for each request of any ASGI application
- `dbscope.integrations.wsgi.ScopeMiddleware`: a scope for each request of any WSGI application
- `dbscope.integrations.flask.Scopes`: a scope for each request, command and application context of a Flask application

The middlewares import neither a framework nor a server.
"""
