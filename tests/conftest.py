"""Being here is what this file is for: pytest puts its folder on the path, so that every test can import from it."""
