"""What keeps a server going whatever its controllers do."""
