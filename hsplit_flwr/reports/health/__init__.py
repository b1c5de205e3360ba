"""The health report of a run: the three known failure signs of the method, each with its cause and a remedy."""
