"""What differs between model families, and nothing else: see README.md."""
