"""One file an objective. Dropping a file in is the whole procedure: its frozen dataclass is the adapter."""
