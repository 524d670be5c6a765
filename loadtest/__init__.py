"""Load on a running server: users over gRPC and over HTTP who send screenshots, and the times they see."""
