"""What a head would accept, without a server."""
