"""The frozen base model: its files, where it can be cut, segments, views and texts."""
