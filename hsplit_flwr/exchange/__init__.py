"""What travels between a head and the tail, and who may send it."""
