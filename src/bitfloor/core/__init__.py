"""L0: value types and tensor arithmetic. Pure: no model, no configuration, no logging, no device choice."""
