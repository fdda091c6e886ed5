"""From radiographs and reports to batches: sources, decoding, shards, loading."""
