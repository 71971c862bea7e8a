"""L2: the papers' mathematics. Tensors and numbers in, tensors out."""
