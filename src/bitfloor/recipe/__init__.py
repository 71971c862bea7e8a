"""L5: what is to be done to a model. Schema, presets, YAML files and dotted overrides.

Nothing is imported here: listing the presets must not pay for the schema (pydantic) or the methods (torch).
"""
