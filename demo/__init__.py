"""The demo checkpoint: screens that we draw, tasks on them, and the small model that learns to answer."""
