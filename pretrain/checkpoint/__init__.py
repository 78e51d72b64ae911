"""A run's directory: its state on disk, averages of the parameters, opening a finished run."""
