"""Closed loop: simulators, recording, evaluation."""
