"""Simulators behind one interface; one file each."""
