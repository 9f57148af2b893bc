"""What recording a LeRobot dataset is made of: drafts, encoders, and renames that a kill cannot halve."""
