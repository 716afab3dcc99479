"""The peer neural-tangents (JAX) in an environment of its own: a script makes it, a child process measures in it."""
