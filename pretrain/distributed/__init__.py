"""The processes of one launch: starting, agreeing, noticing that one is gone."""
