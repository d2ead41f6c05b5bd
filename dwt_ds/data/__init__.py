"""A data folder to rows in order to masked batches. `dwt_ds.prepare` makes the folder once; training only reads it."""
