"""Ways to solve a kernel ridge regression, one module each, named as the method is."""
