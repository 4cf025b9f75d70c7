"""What is under a root, and how it comes there: storage, layout, records, the log."""
