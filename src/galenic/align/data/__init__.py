"""What the methods read, as token ids: conversations, preference pairs, tasks. Bad lines are refused by their number."""
