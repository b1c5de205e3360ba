"""The quickstart with clients that fail on request."""
