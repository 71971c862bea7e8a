"""L2: what the model's own forward tells us: block inputs, call arguments, activations and their statistics."""
