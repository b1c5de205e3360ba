"""From a file to an adapter."""
