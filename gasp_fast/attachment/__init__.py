"""GASP on a model that is already loaded: in the trainer of this package, and in one of the user's own.

build.py     heads of a model's layers, and their supervision
attach.py    `attach`, and `Gasp`, which it returns: matches, loss, metrics, weights
tracked_frames.py  frames and tracks of `Gasp.matches`, checked
callback.py  `GaspCallback` for the Hugging Face `Trainer` and for those of TRL
"""

import gasp_fast.backbones  # noqa: F401 (makes torchvision importable, before callback.py imports transformers)
