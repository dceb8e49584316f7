"""What happened in a generation: its record, the page that replays it, and a summary of one generation."""
