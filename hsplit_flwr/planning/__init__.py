"""Budgets and importance in, cuts and ranks out; when to plan anew; tables and pictures of plans."""
