"""What a plan costs, from a model's config alone: memory, FLOPs, bytes on the wire."""
