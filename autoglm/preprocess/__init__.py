"""From a request to token ids and sampling parameters."""
