"""The adapters' interface to Triton."""
