"""What people look at: one page, its script and style, nothing from outside."""
