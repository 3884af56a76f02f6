"""From anywhere to rows: sources, tar files, streams, formatting, the collator, stored features, damaged samples."""
