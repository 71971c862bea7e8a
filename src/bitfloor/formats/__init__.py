"""L2: how packed matrices become bytes and files. Every format is a stateless codec; files are written atomically."""
