"""A self-hosted reverse tunnel: a public core, agents behind NAT, and the link between them."""

__version__ = "0.1.0"
