"""OpenAI-compatible HTTP gateway to the Triton ensemble."""
