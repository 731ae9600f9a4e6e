"""The agent: dials a core and serves its streams from local services."""
