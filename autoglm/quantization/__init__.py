"""INT8: weights, how they are made, and what they cost."""
