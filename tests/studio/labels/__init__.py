"""Labels, without a server."""
