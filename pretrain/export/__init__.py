"""Trained models for other libraries, weights from other libraries, the model card, uploads, the page about runs."""
