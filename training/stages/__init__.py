"""One module a stage of training: the networks that learn, their losses, and the loop over batches."""
