"""Running over many processes and machines: Ray launches, DeepSpeed shards. Import as `place.cluster`."""
