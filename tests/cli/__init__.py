"""The command `dbscope`: its arguments, its screens, and the demo as a whole."""
