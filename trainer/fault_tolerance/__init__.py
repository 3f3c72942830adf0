"""What keeps a run safe from signals, dead or hanging processes, and a second run in the same folder."""
