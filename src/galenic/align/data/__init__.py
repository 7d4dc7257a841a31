"""What the methods read, as token ids: conversations, preference pairs, tasks. Bad lines are named by number."""
