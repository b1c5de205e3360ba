"""The methods that HSplitLoRA is compared with."""
