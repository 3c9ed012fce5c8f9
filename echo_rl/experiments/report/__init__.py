"""Shows what experiments found in tables, pictures and pages."""
