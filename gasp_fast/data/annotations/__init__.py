"""Tracks of all training sequences, computed once and stored in shards."""
