"""Checkpoints that hold what changed, and runs that go on from them bit for bit."""
