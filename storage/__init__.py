"""Versioned bytes and the news of their change; it knows nothing of resources."""
