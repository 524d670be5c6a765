"""From sound files to text, or to embeddings that the language model reads."""
