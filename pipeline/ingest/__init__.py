"""Files become a snapshot: listing, formats, the contract of rows, passages, units."""
