"""Point tracks from depth, and the choice of frames that form a training sequence."""
