"""Scripted experts, which know the simulator's state; one file a simulator."""
