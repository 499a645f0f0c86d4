"""From files to rows: text as written, parquet by row groups, what a row means, and streams of rows."""
