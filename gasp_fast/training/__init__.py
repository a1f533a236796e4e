"""Training. `loop.py` is the place to begin: it shows what a step does, in order."""
