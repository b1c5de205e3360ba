"""Numbers in, cuts and ranks out: the planning problem and its solvers."""
