"""What every part may use: keyed randomness, errors for users, files that are whole or absent, the terminal."""
