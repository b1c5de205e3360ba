"""HSplitLoRA on E2E NLG."""
