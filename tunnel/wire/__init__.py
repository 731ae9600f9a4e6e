"""The link protocol, sans-IO (SPEC.md): frames, stream states, windows. No await, clock, logger or trio in here."""
