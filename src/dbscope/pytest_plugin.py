"""The pytest plugin of dbscope."""
