"""Files read and written safely: rows, jobs, tables, provenance. Nothing here knows of models."""
