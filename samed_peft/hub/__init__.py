"""Publish adapters on the Hugging Face Hub."""
