"""Writes a trained model as a plain Hugging Face model.

exporter.py    merges adapters, writes the files, reads them back and compares logits
checkpoint.py  the checkpoint that is exported, and its base model
base_files.py  the base model's files with other weights in their places
adapters.py    adapters and heads alone
card.py        the model card
hub.py         the upload
"""

from .adapters import export_adapters
from .checkpoint import find_checkpoint
from .exporter import REPORT, TOLERANCE, ExportReport, Stored, export, load_plain_model, probe

__all__ = [
    "REPORT",
    "TOLERANCE",
    "ExportReport",
    "Stored",
    "export",
    "export_adapters",
    "find_checkpoint",
    "load_plain_model",
    "probe",
]
