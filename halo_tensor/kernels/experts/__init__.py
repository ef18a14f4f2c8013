"""Products of tokens grouped by expert, their quantisers, and copies to and from experts."""
