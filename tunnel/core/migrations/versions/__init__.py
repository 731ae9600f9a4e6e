"""One file a schema version, in the order of their numbers; `tunnel/core/tables.py` lists them in REVISIONS."""
