"""Hosts with addresses of their own on one machine, and what happens when their links are cut."""
