"""What this process holds, as it is shown."""
