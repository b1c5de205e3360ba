"""Flower's faces of the federation."""
