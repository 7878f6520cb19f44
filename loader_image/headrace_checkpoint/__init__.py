"""Pre-sharded checkpoints: layout, manifest, sharder."""
