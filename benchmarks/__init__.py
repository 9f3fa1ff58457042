"""What the runtime costs and how fast it recovers, measured on real processes."""
