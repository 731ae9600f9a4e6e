"""The native mode: `tunnel up` with Prometheus and Alertmanager beside it, for people without Docker.

`files` finds what the project ships under deploy/ and writes it, with this machine's addresses, into the state
directory; `programs` finds Prometheus and Alertmanager; `child` keeps one running process; `up` ties them together.
"""
