"""One step of training, in a head and in the tail."""
