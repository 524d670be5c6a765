"""AutoGLM-Phone on Triton: everything that computes, importable without Triton."""

__version__ = "0.1.0"
