"""What is the arithmetic? Numbers in, numbers out: no paths, no threads."""
