"""The statements about the five systems, each with a test that bears its number."""
