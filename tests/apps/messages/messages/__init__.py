"""The quickstart on Flower's Message API."""
