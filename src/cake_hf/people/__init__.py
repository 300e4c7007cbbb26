"""Floor 5: what people see and call. The command line, its tables and pictures, the demonstration."""
