"""Supervision of decoder layers: correspondence heads on hidden states, and their loss.

layer_capture.py  `LayerCapture` takes the hidden states out of a model's forward pass
heads.py          `CorrespondenceHead`, and its initialisation from a layer's query projection
precision.py      the precision of a head's matrix products
similarity.py     the mean cosine of a layer's embeddings
geometric.py      `GeometricSupervision`: heads and loss, some layers at a time
head_files.py     heads in a checkpoint
"""
