"""Running agents against sessions."""
