"""Sets up, starts, proves, watches and stops the Triton server. Needs nothing but the standard library."""
