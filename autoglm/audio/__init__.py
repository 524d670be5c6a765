"""From audio files to text, or to embeddings for the language model."""
