"""Heterogeneous split LoRA fine-tuning of language models as a Flower plugin (HSplitLoRA, arXiv:2505.02795)."""
