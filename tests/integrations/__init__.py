"""Tests of dbscope.integrations."""
