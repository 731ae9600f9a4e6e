"""The core: takes visitors in, hands their requests to agents, keeps accounts."""
