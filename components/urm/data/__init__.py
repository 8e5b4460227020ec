"""Input of the model: requests, prompts, packing, batches."""
