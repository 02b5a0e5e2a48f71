"""What the guards find, at which level."""
