"""What is a skill vector, what is in its file, and does it fit this model?"""
