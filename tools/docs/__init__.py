"""Helpers of the documentation: what `make docs` needs, and what its tests compare with."""
