"""The finished kernel as an object: entries, diagonal, ridge regression."""
