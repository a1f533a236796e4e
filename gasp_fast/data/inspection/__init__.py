"""Checks whether the geometry of a scene agrees with itself, and draws its tracks."""
