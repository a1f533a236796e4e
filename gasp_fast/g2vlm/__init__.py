"""G²VLM (arXiv 2511.21688): a language model with a geometric expert, as a second objective on this engine.

Nothing in the rest of the package imports this one. What exists so far: the transformer of two experts and its files,
the losses, the scale that aligns a prediction with the truth, the rotation nearest to a matrix, and metrics.
"""
