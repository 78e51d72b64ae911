"""The sampler: which samples an epoch uses, at what noise level, with what weight. On torch and numpy alone."""
