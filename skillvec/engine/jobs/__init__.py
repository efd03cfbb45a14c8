"""What happens to one block: a class for each kind of job, with one contract."""
