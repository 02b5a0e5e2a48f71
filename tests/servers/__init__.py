"""Whole applications on the servers that people run, under load, on PostgreSQL."""
