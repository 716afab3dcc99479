"""Everything on disk: the run directory, its manifest, Jacobian tiles and the kernel."""
