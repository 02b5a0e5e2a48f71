"""Scopes for the work that frameworks and servers hand out. Each module is imported by its path:

- `dbscope.integrations.asgi.ScopeMiddleware`: a scope for each request of any ASGI application
- `dbscope.integrations.wsgi.ScopeMiddleware`: a scope for each request of any WSGI application

Neither imports a framework or a server.
"""
