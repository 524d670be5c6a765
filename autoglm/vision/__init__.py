"""From image files to the embeddings that the language model reads."""
