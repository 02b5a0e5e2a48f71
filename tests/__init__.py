"""The test suite: it mirrors src/dbscope file by file."""
