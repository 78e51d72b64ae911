"""The run directory: checkpoints, EMAs of the parameters and their snapshots, loading a finished run."""
