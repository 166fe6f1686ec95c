"""Answers to files: where files are kept, what a file of answers says of itself, and how a job resumes."""
