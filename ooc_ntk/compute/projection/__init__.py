"""Random projection: one generator for every backend, and the sketches of gradients and factors."""
