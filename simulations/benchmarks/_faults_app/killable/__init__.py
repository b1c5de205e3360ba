"""The quickstart with clients that say where they are."""
