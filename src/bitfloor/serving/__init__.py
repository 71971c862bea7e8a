"""L5: an HTTP server that speaks as OpenAI's does: requests checked, queued for one model, answered or streamed."""
