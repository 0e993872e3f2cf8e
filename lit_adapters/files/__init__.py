"""What lies on disk: adapter directories, peft's format, atomic writing."""
