"""Rotating and quantising."""
