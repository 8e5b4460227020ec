"""What goes into the model: requests, prompts, packing, batches."""
