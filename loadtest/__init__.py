"""Load test of a running server: latencies of users who send screenshots over gRPC and HTTP."""
