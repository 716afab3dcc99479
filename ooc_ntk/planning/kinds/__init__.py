"""Kinds of random projection, one module each, named as the kind is."""
