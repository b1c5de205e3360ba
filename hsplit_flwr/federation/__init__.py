"""A round, whoever carries the messages."""
