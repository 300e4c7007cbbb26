"""Background threads between a store and memory: loaders, staging, the writer, deadlines."""
