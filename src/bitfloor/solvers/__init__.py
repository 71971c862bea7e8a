"""L1: the papers' mathematics. Tensors and numbers in, tensors out."""
