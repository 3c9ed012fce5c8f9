"""Tells what a step costs on one machine: measured profiles, their interpolation and their correction in service."""
