"""Files that can be trusted: written whole or not at all, locked, checked by their checksums, and read by a schema."""
