"""How scale flows through the graph of a model."""
