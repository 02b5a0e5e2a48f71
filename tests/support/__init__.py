"""What tests share: servers, and the gate for what a machine may not have."""
