"""What a loop that is measured tells of itself, step by step."""
