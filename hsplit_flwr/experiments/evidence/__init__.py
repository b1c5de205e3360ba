"""Reading and showing the results of experiments."""
