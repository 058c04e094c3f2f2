"""What a step keeps in memory, and what it costs to keep less."""
