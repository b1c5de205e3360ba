"""What a run measured, as records, tables, pictures and findings."""
