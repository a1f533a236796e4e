"""gasp_fast: geometric supervision for vision-language models."""

__version__ = "0.1.0"
