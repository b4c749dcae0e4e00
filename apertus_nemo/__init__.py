"""Reproducible environments and NeMo recipes for training the Apertus language models."""

__version__ = "0.1.0"
