"""Sparse cross-modal attention: text attends to a part of the visual keys."""
