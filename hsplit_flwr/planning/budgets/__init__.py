"""What devices can afford: stated, measured, or from profiles."""
