"""From a file to an adapter, with HSplitLoRA."""
