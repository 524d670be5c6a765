"""Answers constrained by a grammar."""
