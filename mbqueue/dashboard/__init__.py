"""Render views for terminals and notebooks: `status` of the queue, and `comparison` of recorded experiments."""
