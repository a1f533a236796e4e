"""Computes depth for scenes that have none, and averages depth over patches."""
