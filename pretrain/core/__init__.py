"""Basics for all packages: random numbers by key, padding, errors for the user, atomic file writes, the console."""
