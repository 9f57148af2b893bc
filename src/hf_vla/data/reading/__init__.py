"""What reading a LeRobot dataset is made of: its files near and far, rows, pictures, names."""
