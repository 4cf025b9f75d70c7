"""What a run and an artifact tell people: accounts, comparisons, compression, pages."""
