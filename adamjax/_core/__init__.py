"""Arrays and trees: the ground floor, which knows no optimizer."""
