"""AutoGLM-Phone on Triton Inference Server. Everything outside `autoglm.serving` runs without Triton."""
