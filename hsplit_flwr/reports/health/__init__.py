"""The health report of a run: known signs of trouble, each with its cause and a remedy."""
