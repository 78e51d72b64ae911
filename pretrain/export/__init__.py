"""Trained weights for other libraries and back, the model card, the hub."""
