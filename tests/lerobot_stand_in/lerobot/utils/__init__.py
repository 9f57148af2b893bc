"""Stand-in, see tests/lerobot_stand_in/README.md."""
