"""What every room uses and no room owns: tables, figures, progress lines, provenance, TOML."""
