"""Serves a batch between its plan and its commit: on the host (`eager`) or on the device (`device`)."""
