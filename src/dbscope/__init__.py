"""Give every piece of work its own SQLAlchemy session, and show which work holds which connection."""
