"""Settings: their dataclasses, the command line, finding components by name, building them."""
