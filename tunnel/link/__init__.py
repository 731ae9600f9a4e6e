"""The wire on Trio: one reader and one writer a link, heartbeats, streams; see ARCHITECTURE.md, "The link"."""
