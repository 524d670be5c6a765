"""The OpenAI-compatible HTTP front of the ensemble."""
