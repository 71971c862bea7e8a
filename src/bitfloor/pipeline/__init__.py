"""L4: stages, the block loop, the plan, the journal and the report."""
