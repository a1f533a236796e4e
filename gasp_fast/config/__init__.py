"""Recipes: YAML files and command-line overrides, read into dataclasses."""
