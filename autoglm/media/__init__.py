"""Image and audio files, and the code shared by their encoders."""
