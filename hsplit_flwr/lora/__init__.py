"""What is trained: specs, factors, adapters on a segment, aggregation, deltas, export."""
