"""The processes of one launch: starting them, collectives, noticing that one has ended."""
