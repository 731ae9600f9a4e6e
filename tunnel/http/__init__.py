"""HTTP/1.1 on both ends: heads, answers of our own, pages, and the client side for local services."""
