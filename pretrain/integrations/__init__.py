"""InfoBatch in other libraries' training loops; each module imports its library, so import the one you use."""
