"""The language model and the engine that serves it."""
