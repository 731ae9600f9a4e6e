"""Certificates for visitors from an ACME authority (RFC 8555), got and renewed by the core itself.

`issuer` decides for which names and when; `authority` is the conversation, in threads, because the library for it is
not Trio's; `challenges` holds what the authority comes to read on the plain listener (tunnel/core/plain.py); `ledger`
is what several processes and later starts must know of each other. Certificates lie in a directory like any other
that visitors' certificates are read from (tunnel/core/certificates.py).
"""
