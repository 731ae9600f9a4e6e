"""The store's migrations (alembic). `tunnel/core/database.py` runs them; a package only so that they are installed."""
