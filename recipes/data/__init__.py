"""From sources to batches: files, webdataset, streaming, formatting, collator, feature cache, bad samples."""
