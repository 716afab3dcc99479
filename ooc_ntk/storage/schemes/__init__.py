"""Stores by the scheme of their URLs, one module each, named as the scheme is."""
