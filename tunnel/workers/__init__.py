"""One program in several processes: a supervisor and its workers, the channel between them, and one log."""

#: in a worker's environment: its place, see `tunnel.workers.member`. Not one of the names that configure a program
VARIABLE = "_TUNNEL_WORKER"
