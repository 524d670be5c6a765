"""Measurements: never part of the tests, each a command that prints a table and writes a file."""
