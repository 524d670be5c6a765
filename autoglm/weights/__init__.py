"""Loads weights into modules, and caches quantised weights on disk."""
