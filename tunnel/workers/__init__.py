"""One program in several processes: a supervisor and its workers, the channel between them, and one log."""
