"""From image files to embeddings for the language model."""
