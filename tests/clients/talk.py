"""What all the conversations are about."""

QUESTION = "Please start more workers."
COUNT = 9
"""Most workers that may be started at once."""
DONE = "{count} {kind} workers run now."
