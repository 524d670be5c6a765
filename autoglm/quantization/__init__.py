"""Weight formats and linear layers in INT8."""
