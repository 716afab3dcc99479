"""Inputs: what a user names or holds (models, data, functions, job files) turned into modules and samples."""
