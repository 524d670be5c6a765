"""Speech for the demo checkpoint: a small Wav2Vec2 and a bridge, trained on synthesized commands."""
