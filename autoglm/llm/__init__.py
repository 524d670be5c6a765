"""The language model and its engine."""
