"""Conversations about videos, read in the schema of LLaVA-Video or made from tracks."""
