"""Whole scripts that a person would really write, and a demo that runs one of them through failures."""
