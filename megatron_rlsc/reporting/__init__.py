"""What a run's folder says, for people: a page and a view in the terminal. No torch: they are there at once."""
