"""What the tests share and is no test: tiny models, plain references, engines and clients that stand in, drills."""
