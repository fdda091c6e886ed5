"""`place doctor`: what a user runs first on a new machine or cluster; each finding is one line."""
