"""Writes a trained model as a plain Hugging Face model.

exporter.py    merges adapters, writes the files, reads them back and compares logits
checkpoint.py  the checkpoint that is exported, and its base model
base_files.py  the base model's files with other weights in their places
"""

from .checkpoint import find_checkpoint
from .exporter import REPORT, TOLERANCE, ExportReport, Stored, export, load_plain_model, probe

__all__ = ["REPORT", "TOLERANCE", "ExportReport", "Stored", "export", "find_checkpoint", "load_plain_model", "probe"]
