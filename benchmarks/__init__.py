"""What the runtime costs and how fast it recovers, measured on real processes; each module prints one JSON object."""
