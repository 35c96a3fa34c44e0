"""Draw views for terminals and notebooks. `status` shows the queue, and `comparison` compares recorded experiments."""
