"""L3: packed modules inside a Hugging Face skeleton, and whole models to run."""
