"""Scenes: photographs with cameras and depth, read from folders in several formats."""
