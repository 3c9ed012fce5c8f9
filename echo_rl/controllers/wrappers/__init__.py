"""Controllers around other controllers."""
