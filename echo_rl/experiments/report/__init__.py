"""What an experiment found: tables, pictures and pages."""
