"""L3: packed modules inside a Hugging Face skeleton, whole models to run, and the text they make."""
