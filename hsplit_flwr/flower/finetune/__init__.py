"""From a file to an adapter: the app `simulations/finetune`, and every app that ``hsplit-flwr new`` writes."""
