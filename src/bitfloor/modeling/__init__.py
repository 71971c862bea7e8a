"""L2: Hugging Face models as bitfloor sees them: where the blocks are, what can be quantized, how weights are read."""
