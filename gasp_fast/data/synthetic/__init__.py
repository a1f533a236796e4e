"""Renders scenes with exact geometry, and writes questions about them."""
